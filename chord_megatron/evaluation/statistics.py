"""Numbers out of completions: pass@k, majority votes, and intervals of means. Pure: numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from statistics import NormalDist, fmean
from typing import Literal, NamedTuple

import torch

CONFIDENCE = 0.95
_NUM_RESAMPLES = 10_000
_MOST_AT_ONCE = 10**7  # numbers drawn at a time: 80 MB


class Estimate(NamedTuple):
    """A mean with its confidence interval."""

    value: float
    low: float | None  # None: one prompt says nothing of others
    high: float | None
    interval: Literal["wilson", "bootstrap"]


def pass_at_k(num_completions: int, num_passing: int, k: int) -> float:
    """The chance that one of k completions passes, out of n of which c do: 1 - C(n - c, k) / C(n, k).

    Unbiased for k <= n (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    assert 0 <= num_passing <= num_completions and 1 <= k <= num_completions, (num_completions, num_passing, k)
    return 1 - math.comb(num_completions - num_passing, k) / math.comb(num_completions, k)


def majority(votes: Sequence[str | None], passes: Sequence[bool]) -> float:
    """The chance that the most frequent answer passes; 0 where nobody votes (None is no vote).

    Of several that are equally frequent one is drawn by lot: the mean over the draws is exact, not one of them. An
    answer of which some completions pass and others do not counts with their share.
    """
    of_answer: dict[str, list[bool]] = {}
    for answer, is_right in zip(votes, passes, strict=True):
        if answer is not None:
            of_answer.setdefault(answer, []).append(is_right)
    if not of_answer:
        return 0.0
    most = max(map(len, of_answer.values()))
    return fmean(fmean(found) for found in of_answer.values() if len(found) == most)


def estimate(groups: Sequence[Sequence[float]], seed: int = 0) -> Estimate | None:
    """The mean of all numbers, a group of them for each prompt; None without any.

    Wilson's interval where each prompt has one number, 0 or 1; else the percentile bootstrap over prompts, which
    resamples whole groups: completions of one prompt are not independent of one another.
    """
    groups = [group for group in groups if len(group)]
    if not groups:
        return None
    value = fmean(chain.from_iterable(groups))
    if all(len(group) == 1 and group[0] in (0, 1) for group in groups):
        return Estimate(value, *wilson(round(sum(group[0] for group in groups)), len(groups)), "wilson")
    if len(groups) == 1:
        return Estimate(value, None, None, "bootstrap")
    return Estimate(value, *bootstrap(groups, seed), "bootstrap")


def wilson(num_successes: int, num_trials: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927): also at 0 and 1 it has a width."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, spread = num_successes / num_trials, z * z / num_trials
    middle = share + spread / 2
    half = z * math.sqrt((share * (1 - share) + spread / 4) / num_trials)
    low = 0.0 if num_successes == 0 else (middle - half) / (1 + spread)  # but for rounding it is 0 there, and 1
    return low, 1.0 if num_successes == num_trials else (middle + half) / (1 + spread)


def bootstrap(groups: Sequence[Sequence[float]], seed: int) -> tuple[float, float]:
    """The middle 95% of the means of 10,000 resamples of the groups; the same for the same seed."""
    totals = torch.tensor([math.fsum(group) for group in groups], dtype=torch.float64)
    counts = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _MOST_AT_ONCE // len(groups))
    means = []
    for start in range(0, _NUM_RESAMPLES, at_once):
        shape = (min(at_once, _NUM_RESAMPLES - start), len(groups))
        chosen = torch.randint(len(groups), shape, generator=generator)
        means.append(totals[chosen].sum(1) / counts[chosen].sum(1))
    tail = (1 - CONFIDENCE) / 2
    bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), bounds).tolist()
    return low, high
