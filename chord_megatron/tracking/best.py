"""Which evaluation was the best, and how long ago. Pure: rewards by step in, steps out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def best_step(rewards: Mapping[int, float], steps: Iterable[int]) -> int | None:
    """Of these steps the one with the highest reward, the first of equals; None where none has a reward."""
    return min((step for step in steps if step in rewards), key=lambda step: (-rewards[step], step), default=None)


def evaluations_since_best(rewards: Mapping[int, float]) -> int:
    """How many evaluations came after the best one: in a row they were no better."""
    best = best_step(rewards, rewards)
    return 0 if best is None else sum(step > best for step in rewards)
