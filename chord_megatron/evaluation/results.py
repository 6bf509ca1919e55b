"""What the completions of an evaluation say, together and by source. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from chord_megatron.evaluation.records import Answered, Drawn
from chord_megatron.evaluation.statistics import CONFIDENCE, Estimate, estimate, majority, pass_at_k

Metrics = dict[str, Estimate | None]  # None: no completion has such a number


def metrics_of(rows: Sequence[Answered], passing: tuple[str, float]) -> Metrics:
    """Means over the prompts of `rows`, which have equally many completions.

    passing: a completion passes where this reward function gives it at least so much; an unscorable one does not.
    """
    k = len(rows[0].completions)
    function, least = passing

    def passes(drawn: Drawn) -> bool:
        reward = drawn.rewards[function]
        return reward is not None and reward >= least

    def of_each(number: Callable[[Drawn], float | None]) -> Estimate | None:
        return estimate([[n for drawn in row.completions if (n := number(drawn)) is not None] for row in rows])

    passed = [[passes(drawn) for drawn in row.completions] for row in rows]
    functions = rows[0].completions[0].rewards
    found: Metrics = {"reward_mean": of_each(lambda drawn: drawn.reward)}
    if len(functions) > 1:
        for name in functions:
            found[f"reward/{name}"] = of_each(lambda drawn, name=name: drawn.rewards[name])  # type: ignore[misc]
    for j in range(1, k + 1):
        found[f"pass@{j}"] = estimate([[pass_at_k(k, sum(each), j)] for each in passed])
    if k > 1:
        votes = [[drawn.answer for drawn in row.completions] for row in rows]
        found[f"maj@{k}"] = (
            estimate([[majority(*ballot)] for ballot in zip(votes, passed)]) if any(map(any, votes)) else None
        )
    found["response_length_mean"] = of_each(lambda drawn: drawn.tokens)
    found["truncated_fraction"] = of_each(lambda drawn: drawn.finish_reason == "length")
    return found


def by_source(rows: Sequence[Answered]) -> dict[str, list[Answered]]:
    """The rows of each source, in the order of their first."""
    found: dict[str, list[Answered]] = {}
    for row in rows:
        found.setdefault(row.source, []).append(row)
    return found


def summary(rows: Sequence[Answered], passing: tuple[str, float]) -> dict[str, Any]:
    """As JSON values: everything that the table shows."""
    drawn = [each for row in rows for each in row.completions]
    return {
        "num_prompts": len(rows),
        "num_completions": len(drawn),
        "passes": f"{passing[0]} >= {passing[1]:g}",
        "confidence": CONFIDENCE,
        "unscorable_completions": sum(each.reward is None for each in drawn),
        "reward_errors": sum(each.reward_errors for each in drawn),
        "metrics": _plain(metrics_of(rows, passing)),
        "sources": {
            source: {"num_prompts": len(own), "metrics": _plain(metrics_of(own, passing))}
            for source, own in by_source(rows).items()
        },
    }


def _plain(metrics: Metrics) -> dict[str, Any]:
    return {name: None if found is None else found._asdict() for name, found in metrics.items()}
