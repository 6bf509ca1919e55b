"""Asks a MegatronEngine for everything test_models.py compares: `models_worker.py QUESTIONS.json RESULTS.pt`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from layouts import lay_out
from megatron.core.transformer import utils as transformer_utils
from torch import Tensor

from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.algorithm.policy_losses import clipped_policy_loss
from chord_megatron.backend import generation
from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import ParallelGroups, shut_down_distributed
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.ops.sampling import sample_tokens
from chord_megatron.types import SamplingParams, TrainingSample

MICRO_BATCH_SIZE = 2


def main(questions: dict[str, Any], results: Path) -> None:
    """Answer for each layout and model; rank 0 writes."""
    answers = {}
    for layout, (settings, models) in questions["layouts"].items():
        parallel, groups = lay_out(settings)
        for model in models:
            answers[layout, model] = answer(questions["models"][model], parallel, groups, questions)
    if groups.rank == 0:
        torch.save(answers, results)
    shut_down_distributed()


def answer(path: str, parallel: ParallelConfig, groups: ParallelGroups, questions: dict[str, Any]) -> dict[str, Any]:
    """Log-probs, weights and completions of a model as it was loaded, and what a training step leaves of them."""
    model = ModelConfig(path=path, dtype="float32")
    engine = MegatronEngine(model, parallel, OptimizerConfig(lr=0.01), groups, train_iters=2, keep_reference=True)
    samples = [as_sample(tokens, temperature=1.0) for tokens in questions["sequences"]]

    def log_probs(samples: list[TrainingSample], *, reference: bool = False) -> list[Tensor]:
        batch = build_global_batch(samples, engine.batch_layout, micro_batch_size=MICRO_BATCH_SIZE)
        return engine.compute_log_probs(batch, reference=reference)

    answers: dict[str, Any] = {"log_probs": log_probs(samples), "weights": copy_weights(engine)}
    answers["num_parameters"] = count_parameters(engine)

    prompts, params = questions["prompts"], SamplingParams(**questions["sampling"])
    seeds = [(0, index) for index in range(len(prompts))]
    answers["sampled"] = generate(engine, prompts, seeds, params)
    # Left there, it would be taken for another model's that gets the same address, and keep this one alive.
    assert not transformer_utils._sequence_parallel_attr_cache, (
        "generation leaves Megatron-Core's cache of modules behind"
    )
    if groups.tp_size > 1 and engine.arch.moe is not None:
        answers["sampled_astray"] = generate_astray(engine, prompts, seeds, params)
    completed = [as_sample([*p, *c], params.temperature) for p, (c, _) in zip(prompts, answers["sampled"])]
    answers["log_probs_of_sampled"] = log_probs(completed)
    greedy = SamplingParams(**{**questions["sampling"], "temperature": 0.0})
    answers["greedy"] = [tokens for tokens, _ in generate(engine, prompts, seeds, greedy)]

    answers["apart"], answers["shared"] = (rows_of_one_prompt(engine, questions, shares) for shares in (False, True))
    answers["loss"], answers["grad_norm"] = train_step(engine, samples)
    answers["trained_weights"] = copy_weights(engine)
    answers["trained_log_probs"] = log_probs(samples)
    answers["ref_log_probs"] = log_probs(samples, reference=True)
    answers["weights_after_reference"] = copy_weights(engine)
    return answers


def generate(
    engine: MegatronEngine, prompts: list, seeds: list, params: SamplingParams
) -> list[tuple[list[int], list[float]]]:
    """The engine's completions as lists."""
    completions = engine.generate(prompts, seeds, params)
    return [(tokens.tolist(), log_probs.tolist()) for tokens, log_probs in completions]


def generate_astray(engine: MegatronEngine, prompts: list, seeds: list, params: SamplingParams) -> list:
    """What each tensor-parallel rank says it generated, when those behind the first draw other tokens."""

    def draw(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        tokens, log_probs = sample_tokens(*args, **kwargs)
        rank = engine.groups.tp_rank
        return (tokens + rank) % engine.arch.vocab_size, log_probs - rank

    with mock.patch.object(generation, "sample_tokens", draw):
        mine = generate(engine, prompts, seeds, params)
    everyone: list = [None] * engine.groups.tp_size
    dist.all_gather_object(everyone, mine, group=engine.groups.tp_group)
    return everyone


def count_parameters(engine: MegatronEngine) -> list[tuple[int, int]]:
    """(pipeline rank, number of parameters) of every rank."""
    mine = engine.groups.pp_rank, sum(p.numel() for chunk in engine._chunks for p in chunk.parameters())
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def as_sample(tokens: list[int], temperature: float) -> TrainingSample:
    """All tokens of a sequence as expert tokens."""
    mask = torch.ones(len(tokens), dtype=torch.bool)
    return TrainingSample(torch.tensor(tokens), mask, is_expert=True, temperature=temperature)


def train_step(engine: MegatronEngine, samples: list[TrainingSample]) -> tuple[float, float]:
    """(loss, gradient norm) of one step of SFT."""
    batch = build_global_batch(samples, engine.batch_layout, micro_batch_size=MICRO_BATCH_SIZE)
    objective = Objective(partial(clipped_policy_loss, epsilon=0.2, epsilon_high=0.2))
    totals = engine.forward_backward(batch, partial(chord_loss, objective=objective, mu=1.0))
    step = engine.optimizer_step()
    assert step.stepped
    return totals.sums["loss_expert"], step.grad_norm


def rows_of_one_prompt(
    engine: MegatronEngine, questions: dict[str, Any], shares_prompts: bool
) -> tuple[list[Tensor], float]:
    """(log-probs, gradient norm) of rows that begin alike, in micro-batches of all of them."""
    prompt, *endings = sorted(questions["sequences"], key=len, reverse=True)
    rows = [torch.tensor([*prompt, *ending]) for ending in endings]
    samples = [TrainingSample(r, torch.arange(len(r)) >= len(prompt), is_expert=True, temperature=1.0) for r in rows]
    layout = engine.batch_layout
    batch = build_global_batch(samples, layout, micro_batch_size=len(rows), shares_prompts=shares_prompts)
    is_shared = batch.micro_batches[0].token_of is not None
    assert is_shared == (shares_prompts and layout.can_share_prompts)
    log_probs = engine.compute_log_probs(batch)
    objective = Objective(partial(clipped_policy_loss, epsilon=0.2, epsilon_high=0.2))
    engine.forward_backward(batch, partial(chord_loss, objective=objective, mu=1.0))
    return log_probs, engine._gradient_norm()


def copy_weights(engine: MegatronEngine) -> dict[str, Tensor]:
    """The exported tensors, which the next step would change."""
    return {name: tensor.clone() for name, tensor in engine.export_hf_weights()}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
