"""Rewards on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chord_megatron.tracking.step_metrics import rollout_metrics
from chord_megatron.training.sampler import Sampler
from chord_megatron.training.scorer import Scorer
from chord_megatron.types import Metrics, Prompt, SamplingParams, ScoredRollouts

_EVALUATION = 2**32 - 1  # the step that seeds evaluations: none of training's


@dataclass(frozen=True)
class Evaluator:
    """`evaluate` is a collective call of all ranks."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    sampler: Sampler
    scorer: Scorer

    def evaluate(self) -> tuple[Metrics, ScoredRollouts]:
        """One completion of each held-out prompt."""
        drawing = self.sampler.draw(self.prompts, self.params, num_generations=1, step=_EVALUATION)
        scored = self.scorer.score(self.prompts, drawing.result())
        self.sampler.timer.times()  # evaluations are not part of a step
        return {f"eval_{name}": value for name, value in rollout_metrics(scored).items()}, scored
