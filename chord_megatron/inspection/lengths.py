"""How long rows are: quantiles and a histogram, in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MOST_BINS = 12


@dataclass(frozen=True)
class Bin:
    """Rows of `start` tokens and more, and of fewer than `stop`."""

    start: int
    stop: int
    count: int


@dataclass(frozen=True)
class Lengths:
    """Of one kind of row."""

    what: str
    count: int
    smallest: int
    median: int
    p95: int  # 95 of 100 rows are no longer
    largest: int
    mean: float
    bins: tuple[Bin, ...]
    limit: tuple[str, int] | None  # the key that bounds them, and its value


def measure_lengths(what: str, lengths: Sequence[int], limit: tuple[str, int] | None) -> Lengths | None:
    """None where there is nothing to measure."""
    if not lengths:
        return None
    ranked = sorted(lengths)
    return Lengths(
        what=what,
        count=len(ranked),
        smallest=ranked[0],
        median=ranked[math.ceil(0.5 * len(ranked)) - 1],
        p95=ranked[math.ceil(0.95 * len(ranked)) - 1],
        largest=ranked[-1],
        mean=sum(ranked) / len(ranked),
        bins=_bins(ranked),
        limit=limit,
    )


def _bins(ranked: Sequence[int]) -> tuple[Bin, ...]:
    """Of the same width, the smallest of 1, 2, 5, 10, 20 ... that needs few bins."""
    smallest, largest = ranked[0], ranked[-1]
    widths = (step * 10**power for power in range(20) for step in (1, 2, 5))
    width = next(width for width in widths if largest // width - smallest // width < _MOST_BINS)
    counts = dict.fromkeys(range(smallest // width, largest // width + 1), 0)
    for length in ranked:
        counts[length // width] += 1
    return tuple(Bin(number * width, (number + 1) * width, count) for number, count in counts.items())
