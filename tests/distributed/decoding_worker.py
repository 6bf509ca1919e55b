"""Draws completions in all the ways that test_decoding.py compares: `decoding_worker.py QUESTIONS.json RESULTS.pt`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layouts import lay_out

from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import ParallelGroups, shut_down_distributed
from chord_megatron.backend.model import unwrap
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.rollout.embedded import EmbeddedRollout
from chord_megatron.types import Prompt, RolloutRequest, SamplingParams

Drawn = list[tuple[list[int], list[float]]]


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
    """What is drawn row by row, all at once and by the rollout engine, and what the first stage read for it."""
    model = ModelConfig(path=path, dtype="float32")
    engine = MegatronEngine(model, parallel, OptimizerConfig(), groups, train_iters=1, keep_reference=False)
    prompts = [Prompt(i, "", tuple(tokens), "") for i, tokens in enumerate(questions["prompts"])]
    params = SamplingParams(**questions["sampling"])
    request = RolloutRequest(prompts, params, questions["num_generations"], step=5, policy_version=0)
    rows, seeds = [prompt.tokens for prompt in request.repeated], [(3, 5, i) for i in range(len(request.repeated))]

    def draw(start: int, stop: int) -> Drawn:
        drawn = engine.generate(rows[start:stop], seeds[start:stop], params)
        return [(tokens.tolist(), log_probs.tolist()) for tokens, log_probs in drawn]

    answers: dict[str, Any] = {"alone": [draw(i, i + 1)[0] for i in range(len(rows))], "read": {}, "rollout": {}}
    with noted(engine) as shapes:
        answers["together"] = draw(0, len(rows))
    answers["read"]["together"] = shapes
    for size in questions["batch_sizes"]:
        rollout = EmbeddedRollout(engine, groups.dp_group, groups.device, seed=3, max_batch_size=size)
        with noted(engine) as shapes:
            samples = rollout.generate(request)
        answers["rollout"][size] = [(s.response_tokens, s.rollout_log_probs[s.response_mask].tolist()) for s in samples]
        of_ranks: list[Any] = [None] * groups.dp_size
        dist.all_gather_object(of_ranks, shapes, group=groups.dp_group)
        answers["read"][size] = of_ranks
    return answers


@contextmanager
def noted(engine: MegatronEngine) -> Iterator[list[tuple[int, int]]]:
    """The (rows, tokens) of each prefill of this rank's first chunk meanwhile."""
    shapes: list[tuple[int, int]] = []

    def note(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["inference_context"].sequence_len_offset == 0:
            shapes.append(tuple(kwargs["input_ids"].shape))

    hook = unwrap(engine._chunks[0]).register_forward_pre_hook(note, with_kwargs=True)
    yield shapes
    hook.remove()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
