"""Asks engines for what test_router_replay.py compares: `router_replay_worker.py QUESTIONS.json RESULTS.pt`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layouts import lay_out
from torch import Tensor

from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.algorithm.policy_losses import gpg_policy_loss
from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import shut_down_distributed
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.config import ModelConfig, OptimizerConfig
from chord_megatron.types import LIVE, GlobalBatch, SamplingParams, TrainingSample

OBJECTIVE = Objective(gpg_policy_loss)  # it follows every log-prob
MU = 0.4
Rows = Sequence[Tensor] | None  # the routing of each rollout


def main(questions: dict[str, Any], results: Path) -> None:
    """Answer for each layout and model; rank 0 writes."""
    answers = {}
    for layout, (settings, models) in questions["layouts"].items():
        parallel, groups = lay_out(settings["parallel"])
        for name in models:
            interviews = []
            for path in questions["models"][name]:  # as it was drawn from, and as it has become
                model = ModelConfig(path=path, dtype="float32", recompute=settings["recompute"])
                engine = MegatronEngine(model, parallel, OptimizerConfig(), groups, train_iters=2, keep_reference=True)
                packing = {key: settings[key] for key in ("micro_batch_size", "shares_prompts")}
                interviews.append(Interview(engine, questions, packing))
            answers[layout, name] = answer(*interviews)
    if groups.rank == 0:
        torch.save(answers, results)
    shut_down_distributed()


def answer(first: Interview, moved: Interview) -> dict[str, Any]:
    """What is drawn, what passes choose, and log-probs and gradients under that choice and others."""
    scored = first.choices(None)
    shifted = [first.shifted(routing) for routing in scored]
    return {
        "drawn": first.draw(),
        "scored": scored,
        "shifted": shifted,
        "moved, scored": moved.choices(None),
        "moved, scored under replay": moved.choices(scored),
        "first": {kind: first.gradient(given) for kind, given in (("live", None), ("scored", scored))},
        "moved": {
            kind: moved.gradient(given) for kind, given in (("live", None), ("scored", scored), ("shifted", shifted))
        },
        "log-probs": {
            "live": first.engine.compute_log_probs(first.pack(None)),
            "shifted": first.engine.compute_log_probs(first.pack(shifted)),
            "reference": first.engine.compute_log_probs(first.pack(shifted), reference=True),
        },
    }


@dataclass(frozen=True)
class Interview:
    """Of one engine."""

    engine: MegatronEngine
    questions: dict[str, Any]
    packing: dict[str, Any]

    def draw(self) -> list[tuple[list[int], Tensor, Tensor]]:
        """(prompt and completion, experts while it was drawn, and when it is scored) of each prompt."""
        prompts, params = self.questions["prompts"], SamplingParams(**self.questions["sampling"])
        seeds = [(0, index) for index in range(len(prompts))]
        drawn = self.engine.generate(prompts, seeds, params, record_routing=True)
        unheard = self.engine.generate(prompts, seeds, params)
        assert all(torch.equal(row[0], other[0]) and len(other) == 2 for row, other in zip(drawn, unheard, strict=True))
        sequences = [[*prompt, *row[0].tolist()] for prompt, row in zip(prompts, drawn)]
        samples = [TrainingSample(torch.tensor(s), torch.ones(len(s)) > 0, True, 1.0) for s in sequences]
        batch = build_global_batch(samples, self.engine.batch_layout, **self.packing)
        with self.engine.recorded_routing(batch) as scored:
            self.engine.compute_log_probs(batch)
        return [(sequence, row[2], routing) for sequence, row, routing in zip(sequences, drawn, scored, strict=True)]

    def pack(self, routing: Rows) -> GlobalBatch:
        """Rollouts, with that routing, between expert rows."""
        rollouts = [
            TrainingSample(
                tokens=torch.tensor(tokens),
                loss_mask=torch.arange(len(tokens)) >= 2,
                is_expert=False,
                temperature=1.0,
                advantage=1.0 + index,
                routing=None if routing is None else routing[index],
            )
            for index, tokens in enumerate(self.questions["rollouts"])
        ]
        experts = [
            TrainingSample(torch.tensor(tokens), torch.arange(len(tokens)) >= 1, is_expert=True, temperature=1.0)
            for tokens in self.questions["experts"]
        ]
        samples = [sample for pair in zip(rollouts, experts, strict=True) for sample in pair]
        return build_global_batch(samples, self.engine.batch_layout, **self.packing)

    def choices(self, routing: Rows) -> list[Tensor]:
        """What the routers choose for the rollouts in a pass over them, where they may."""
        batch = self.pack(routing)
        with self.engine.recorded_routing(batch) as rows:
            self.engine.compute_log_probs(batch)
        return rows[::2]

    def shifted(self, routing: Tensor) -> Tensor:
        """Other experts for all tokens but the last."""
        assert self.engine.arch.moe is not None
        shifted = (routing + 1) % self.engine.arch.moe.num_experts
        shifted[-1] = LIVE
        return shifted

    def gradient(self, routing: Rows) -> dict[str, Any]:
        """Loss, gradient norm, and what the routers did."""
        totals = self.engine.forward_backward(self.pack(routing), partial(chord_loss, objective=OBJECTIVE, mu=MU))
        counts = self.engine.count_routing()
        assert counts is not None
        loss = (1 - MU) * totals.sums["loss_rollout"] + MU * totals.sums["loss_expert"]
        return {"loss": loss, "grad_norm": self.engine._gradient_norm(), **counts._asdict()}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
