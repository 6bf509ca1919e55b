"""What the curves of a run suggest, in words. Each sentence comes from a rule with its threshold in RULES.

A rule is a pure function of the lines of metrics.jsonl; docs/metrics.md has the same table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_COMPARE: dict[str, Callable[[float, float], bool]] = {"below": operator.lt, "above": operator.gt, "at": operator.eq}


@dataclass(frozen=True)
class Rule:
    """Speaks where a metric has been beyond its threshold at the last `lasting` measurements, or at more of them."""

    metric: str
    side: Literal["below", "above", "at"]
    threshold: float
    lasting: int
    sentence: str
    of_first: bool = False  # the threshold is a share of the first value
    only_at: tuple[str, float] | None = None  # another metric, which contradicts the sentence where it is not at this

    @property
    def condition(self) -> str:
        """The threshold in words."""
        return f"{self.side} {self.threshold:g}{' of its first value' if self.of_first else ''}"

    def since(self, rows: Sequence[Mapping[str, Any]]) -> int | None:
        """The step since which it holds without a break up to the last measurement; None: it does not."""
        known = [row for row in rows if row.get(self.metric) is not None]
        threshold = self.threshold * known[0][self.metric] if self.of_first and known else self.threshold
        begin = len(known)
        while begin and self._holds(known[begin - 1], threshold):
            begin -= 1
        return known[begin]["step"] if len(known) - begin >= self.lasting else None

    def _holds(self, row: Mapping[str, Any], threshold: float) -> bool:
        if self.only_at is not None:
            other, value = self.only_at
            if row.get(other) not in (None, value):
                return False
        return _COMPARE[self.side](row[self.metric], threshold)

    def says(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Its sentence about the steps of a run, in order; None where it has nothing to say."""
        step = self.since(rows)
        return None if step is None else f"{self.metric} {self.condition} since step {step}: {self.sentence}"


RULES = (
    Rule("mu", "at", 0, 5, "experts are not trained on."),
    Rule("mu", "at", 1, 5, "rollouts are not trained on: this is supervised learning."),
    Rule(
        "phi_mean",
        "below",
        0.01,
        5,
        "the policy is sure of the experts' tokens, of right and wrong ones; under phi experts teach nothing more.",
    ),
    Rule(
        "expert_p/0.0",
        "above",
        0.5,
        5,
        "most expert tokens are all but impossible for the policy; phi leaves them out, and supervised steps first "
        "(mu near 1, without phi) would bring it closer.",
    ),
    Rule(
        "gradient_cosine",
        "below",
        -0.1,
        3,
        "the gradients of the two streams oppose each other; experts may answer in another way than rewards ask for.",
    ),
    Rule("gradient_share", "above", 0.95, 3, "nearly all of the gradient comes from experts; lower mu."),
    Rule("gradient_share", "below", 0.05, 3, "nearly all of the gradient comes from rollouts; experts hardly count."),
    Rule(
        "entropy",
        "below",
        0.1,
        5,
        "the policy hardly explores any more, and its completions become alike.",
        of_first=True,
    ),
    Rule(
        "zero_std_fraction",
        "at",
        1,
        5,
        "no group has different rewards, so that rollouts teach nothing; take prompts of another difficulty, or more "
        "generations of each (where rewards are missing, unscorable_completions counts them).",
        only_at=("idle_row_fraction", 1),  # grpo.kl_in_reward tells apart completions whose rewards are equal
    ),
    Rule(
        "idle_row_fraction",
        "above",
        0.75,
        5,
        "more than three completions in four teach nothing: their groups' rewards are equal or missing, or they "
        "are filtered out.",
    ),
    Rule(
        "effective_sample_size",
        "below",
        0.5,
        5,
        "sampler and trainer disagree on what was drawn; look at log_prob_diff_mean, and set "
        "grpo.rollout_importance_sampling_mode.",
    ),
    Rule(
        "truncated_fraction",
        "above",
        0.5,
        5,
        "more than half of the completions are cut off; raise rollout.max_completion_length.",
    ),
)


def findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the rules say of the training steps of a run, in the order of RULES."""
    return [said for rule in RULES if (said := rule.says(rows)) is not None]
