"""Rewards on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from chord_megatron.config import TrainConfig
from chord_megatron.tracking.step_metrics import rollout_metrics
from chord_megatron.training.sampler import Sampler
from chord_megatron.training.scorer import Scorer
from chord_megatron.types import Metrics, Prompt, SamplingParams, ScoredRollouts

_EVALUATION = 2**32 - 1  # the step that seeds evaluations: none of training's


def build_evaluator(
    train: TrainConfig, prompts: Sequence[Prompt], params: SamplingParams, sampler: Sampler, scorer: Scorer
) -> Evaluator:
    """Of held-out prompts at train.eval_temperature, out of the whole distribution; `params` are training's."""
    params = replace(params, temperature=train.eval_temperature, top_p=1.0, top_k=0)
    return Evaluator(prompts, params, sampler, scorer, train.eval_num_generations)


@dataclass(frozen=True)
class Evaluator:
    """Every method is a collective call of all ranks."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    sampler: Sampler
    scorer: Scorer
    num_generations: int = 1  # completions of each prompt

    def evaluate(self) -> tuple[Metrics, ScoredRollouts]:
        """Completions of all held-out prompts."""
        scored = self.score(self.prompts)
        return {f"eval_{name}": value for name, value in rollout_metrics(scored).items()}, scored

    def score(self, prompts: Sequence[Prompt], first: int = 0) -> ScoredRollouts:
        """Completions of some of the prompts, the same as in one call for all; `first`: how many are before them."""
        drawing = self.sampler.draw(
            prompts,
            self.params,
            num_generations=self.num_generations,
            step=_EVALUATION,
            first_place=first * self.num_generations,
        )
        scored = self.scorer.score(prompts, drawing.result())
        self.sampler.timer.times()  # evaluations are not part of a step
        return scored
