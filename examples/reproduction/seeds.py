"""Means over seeds, spreads, and paired differences with intervals. Pure: numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import t

CONFIDENCE = 0.95
ROUNDING = 1e-9


class Spread(NamedTuple):
    """Of one number over seeds."""

    mean: float
    sd: float  # of the sample, n - 1; 0 of one


class Difference(NamedTuple):
    """A mean of paired differences with its t interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves 0 out, by more than rounding, else 0."""
        return (self.low > ROUNDING) - (self.high < -ROUNDING)


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else 0.0)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """The mean of ours - theirs, seed by seed, and its interval of Student's t; from one seed no interval bounds it."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, sd = spread(differences)
    if len(differences) == 1:
        return Difference(mean, -math.inf, math.inf)
    half = half_width(sd, len(differences))
    return Difference(mean, mean - half, mean + half)


def half_width(sd: float, count: int) -> float:
    """Of the interval of a mean of `count` numbers with this standard deviation."""
    return float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * sd / math.sqrt(count)


def next_one(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Where another run of the same distribution lies with this confidence: Student's prediction interval."""
    mean, sd = spread(values)
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * sd * math.sqrt(1 + 1 / len(values))
    return mean - half, mean + half
