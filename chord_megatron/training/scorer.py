"""Rewards of completions, with the time they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chord_megatron.rewards.functions import RewardFunctions
from chord_megatron.rewards.scoring import score_rollouts
from chord_megatron.tracking.timers import PhaseTimer
from chord_megatron.types import Prompt, RolloutSample, ScoredRollouts


@dataclass(frozen=True)
class Scorer:
    """`score` is a collective call of all ranks."""

    tokenizer: Any
    reward_function: RewardFunctions
    timer: PhaseTimer

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[RolloutSample]) -> ScoredRollouts:
        """The completions with their rewards; `rollouts` are the groups of `prompts` in order. Raises UserError."""
        with self.timer("reward"):
            return score_rollouts(prompts, rollouts, self.tokenizer, self.reward_function)
