"""Compares the gradients of two streams in a MegatronEngine: `diagnosis_worker.py QUESTIONS.json RESULTS.pt`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layouts import lay_out
from models_worker import copy_weights

from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.algorithm.policy_losses import clipped_policy_loss
from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import ParallelGroups, shut_down_distributed
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.types import TrainingSample

STEPS = 3


def main(questions: dict[str, Any], results: Path) -> None:
    """Answer for each layout and model; rank 0 writes."""
    answers = {}
    samples = [as_sample(**sample) for sample in questions["samples"]]
    for layout, (settings, optimizer, models) in questions["layouts"].items():
        _, groups = lay_out(settings)
        for model in models:
            build = partial(new_engine, questions["models"][model], settings, optimizer, groups)
            answers[layout, model] = {
                name: train(build(), samples, questions["mu"], name) for name in ("plain", "diagnosed")
            }
    if groups.rank == 0:
        torch.save(answers, results)
    shut_down_distributed()


def new_engine(
    path: str, parallel: dict[str, Any], optimizer: dict[str, Any], groups: ParallelGroups
) -> MegatronEngine:
    return MegatronEngine(
        ModelConfig(path=path, dtype="float32"),
        ParallelConfig(**parallel),
        OptimizerConfig(lr=0.01, **optimizer),
        groups,
        train_iters=STEPS,
        keep_reference=False,
    )


def train(engine: MegatronEngine, samples: list[TrainingSample], mu: float, name: str) -> dict[str, Any]:
    """The comparisons of each step on every rank, the steps, rows of the last, and the weights after them."""
    objective = Objective(partial(clipped_policy_loss, epsilon=0.2, epsilon_high=0.2))
    rollout_loss, expert_loss, loss = (partial(chord_loss, objective=objective, mu=share) for share in (0.0, 1.0, mu))
    batch = build_global_batch(samples, engine.batch_layout, micro_batch_size=2)
    comparisons, steps, rows = [], [], []
    for _ in range(STEPS):
        if name == "diagnosed":
            mine = tuple(engine.compare_gradients(batch, rollout_loss, expert_loss))
            everyone: list = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
            comparisons.append(everyone)
        totals = engine.forward_backward(batch, loss)
        update = engine.optimizer_step()
        assert update.stepped
        steps.append((totals.sums["loss_rollout"], totals.sums["loss_expert"], update.grad_norm))
        rows.append(totals.rows)
    refused = is_refused(engine) if name == "diagnosed" else None
    return {
        "comparisons": comparisons,
        "steps": steps,
        "rows": rows,
        "weights": copy_weights(engine),
        "refused": refused,
    }


def is_refused(engine: MegatronEngine) -> bool:
    """Whether gradients of a comparison cannot be stepped on."""
    sample = as_sample(list(range(8)), 4, advantage=None)
    batch = build_global_batch([sample] * 2, engine.batch_layout, micro_batch_size=1)
    loss = partial(chord_loss, objective=Objective(partial(clipped_policy_loss, epsilon=0.2, epsilon_high=0.2)), mu=1.0)
    engine.compare_gradients(batch, loss, loss)
    try:
        engine.optimizer_step()
    except AssertionError as error:
        return "there are no gradients" in str(error)
    return False


def as_sample(tokens: list[int], prompt_length: int, advantage: float | None) -> TrainingSample:
    """An expert's without an advantage."""
    is_expert = advantage is None
    return TrainingSample(
        torch.tensor(tokens),
        torch.arange(len(tokens)) >= prompt_length,
        is_expert=is_expert,
        temperature=1.0 if is_expert else 0.8,
        advantage=advantage or 0.0,
        rollout_log_probs=None if is_expert else torch.zeros(len(tokens)),
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
