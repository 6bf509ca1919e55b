"""pass@k, majority votes and intervals, against numbers computed by hand or by enumeration."""

from __future__ import annotations

import math
from itertools import combinations, product
from statistics import fmean

import pytest
import torch

from chord_megatron.evaluation.statistics import Estimate, bootstrap, estimate, majority, pass_at_k, wilson


def test_pass_at_k_by_hand():
    assert pass_at_k(8, 0, 8) == 0.0
    assert pass_at_k(8, 3, 1) == 1 - 5 / 8
    assert pass_at_k(8, 3, 2) == 1 - 10 / 28
    assert pass_at_k(8, 3, 6) == pass_at_k(1, 1, 1) == 1.0


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n: int):
    for c in range(n + 1):
        passes = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(fmean(map(any, combinations(passes, k))), abs=1e-15)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_pass_at_k_is_unbiased(p: float):
    """Over all outcomes of five tries that pass with chance p it is 1 - (1 - p)^k; 1 - (1 - c/n)^k is not."""
    for k in range(1, 6):
        outcomes = [sum(tries) for tries in product((0, 1), repeat=5)]
        expected = math.fsum(p**c * (1 - p) ** (5 - c) * pass_at_k(5, c, k) for c in outcomes)
        assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


@pytest.mark.parametrize(
    ("votes", "passes", "chance"),
    [
        ("aab", (1, 1, 0), 1.0),
        ("abb", (1, 0, 0), 0.0),
        ("aabb", (1, 1, 0, 0), 1 / 2),  # a tie is drawn by lot
        ("abc", (0, 0, 1), 1 / 3),
        ("aabbc", (1, 1, 0, 0, 0), 1 / 2),  # c is behind
        ("aab", (1, 0, 0), 1 / 2),  # the function sees more than the answer
    ],
)
def test_majority_by_hand(votes: str, passes: tuple[int, ...], chance: float):
    assert majority([*votes], [*map(bool, passes)]) == chance


def test_who_has_no_answer_does_not_vote():
    assert majority([None, None, "a"], [False, False, True]) == 1.0
    assert majority([None, None], [True, False]) == 0.0


def test_majority_of_a_tie_is_the_mean_of_all_lots():
    votes, passes = ["a", "b", "a", "b", "c", "c", "d"], [True, False, True, False, False, False, True]
    lots = [all(p for v, p in zip(votes, passes) if v == winner) for winner in "abc"]
    assert majority(votes, passes) == fmean(lots)


def test_wilson_by_hand():
    # (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.959963984540054
    assert wilson(5, 10) == pytest.approx((0.236593090512564, 0.763406909487436), abs=1e-12)
    # At 0 of n: from 0 to z^2 / (n + z^2), and z^2 = 3.841458820694124.
    assert wilson(0, 20) == pytest.approx((0.0, 3.841458820694124 / 23.841458820694124), abs=1e-12)
    assert wilson(20, 20) == pytest.approx((20 / 23.841458820694124, 1.0), abs=1e-12)


@pytest.mark.parametrize("trials", range(1, 200))
def test_wilson_ends_exactly_where_all_or_none_passes(trials: int):
    """Of rounding 3e-17 was left, which a table shows."""
    assert (wilson(0, trials)[0], wilson(trials, trials)[1]) == (0.0, 1.0)


def test_proportions_have_wilsons_interval():
    assert estimate([[1.0], [0.0], [0.0], [1.0]]) == Estimate(0.5, *wilson(2, 4), "wilson")


def test_other_means_have_a_bootstrap_over_prompts():
    groups = [[0.0, 1.0], [1.0, 1.0], [0.25, 0.5], []]  # the last prompt has no number
    found = estimate(groups, seed=3)
    assert found is not None and found.interval == "bootstrap" and found.value == fmean([0, 1, 1, 1, 0.25, 0.5])
    assert (found.low, found.high) == bootstrap(groups[:3], 3) == estimate(groups, seed=3)[1:3]


def test_the_bootstrap_of_two_prompts_by_hand():
    """Each of the two means has a chance of 1/4, their middle 1/2: the 2.5% quantiles are the means themselves."""
    assert bootstrap([[0.0, 0.5], [2.0, 2.0]], 0) == (0.25, 2.0)


def test_the_bootstrap_is_as_wide_as_theory_says():
    values = torch.linspace(0, 1, 400).tolist()
    low, high = bootstrap([[value] for value in values], 0)
    spread = torch.tensor(values).std().item() / math.sqrt(400)
    assert (low, high) == pytest.approx((0.5 - 1.96 * spread, 0.5 + 1.96 * spread), abs=0.05 * spread * 2)


def test_completions_of_one_prompt_are_not_counted_as_prompts():
    """A hundred equal completions of two prompts say as little as one of each."""
    assert bootstrap([[0.0] * 100, [1.0] * 100], 0) == bootstrap([[0.0], [1.0]], 0) == (0.0, 1.0)


def test_what_there_is_no_interval_of():
    assert estimate([]) is None and estimate([[], []]) is None
    assert estimate([[0.5, 1.0]]) == Estimate(0.75, None, None, "bootstrap")
