"""Advantages by hand, against the peers' own numbers, and against a reference of plain Python with missing rewards."""

from __future__ import annotations

import json
import math
import statistics
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chord_megatron.algorithm.advantages import (
    ESTIMATORS,
    AdvantageEstimator,
    Scale,
    gdpo_advantages,
    group_advantages,
    zero_std_fraction,
)
from chord_megatron.config import Config
from chord_megatron.planning.rewards import check_rewards, reward_scale, reward_settings
from chord_megatron.system.errors import UserError
from chord_megatron.training.advantages import advantages_of
from chord_megatron.types import Prompt, RolloutSample, ScoredRollouts

REPEATABLE = settings(derandomize=True, database=None, deadline=None, max_examples=60)
PEERS = json.loads((Path(__file__).parents[1] / "data" / "peer_advantages.json").read_text(encoding="utf-8"))
NAN = math.nan
# All that a configuration may ask for.
CHOICES = [(name, scale) for name, estimator in ESTIMATORS.items() for scale in estimator.scales if scale != "gdpo"]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- by hand --------------------------------------------------------------------------------------------------------

# Two groups of three: means 2 and 3, squares 14 and 2 over 2, all six: mean 5/2, squares 1 + 17/2 + 7 over 5.
REWARDS, LENGTHS = [0.0, 1.0, 5.0, 2.0, 3.0, 4.0], [2.0, 5.0, 1.0, 1.0, 1.0, 2.0]
CENTRED = [-2.0, -1.0, 3.0, -1.0, 0.0, 1.0]
STD_1, STD_2, STD_ALL = math.sqrt(14 / 2), 1.0, math.sqrt(17.5 / 5)
STD_CENTRED = math.sqrt(16 / 5)


@pytest.mark.parametrize(
    ("estimator", "scale", "expected"),
    [
        ("grpo", "none", CENTRED),
        ("grpo", "group", [c / (STD_1 + 0.5) for c in CENTRED[:3]] + [c / (STD_2 + 0.5) for c in CENTRED[3:]]),
        ("grpo", "batch", [c / (STD_ALL + 0.5) for c in CENTRED]),
        ("rloo", "none", [-3.0, -1.5, 4.5, -1.5, 0.0, 1.5]),  # 0 - (1 + 5) / 2, 1 - 5 / 2, 5 - 1 / 2, ...
        ("rloo", "batch", [1.5 * c / (STD_ALL + 0.5) for c in CENTRED]),
        ("reinforce_plus_plus", "batch", [c / (STD_CENTRED + 0.5) for c in CENTRED]),
        ("reinforce_plus_plus", "none", CENTRED),
        # (0 * 2 + 1 * 5 + 5 * 1) / 8 = 5/4, (2 + 3 + 8) / 4 = 13/4.
        ("opo", "none", [-1.25, -0.25, 3.75, -1.25, -0.25, 0.75]),
        ("pass_at_k", "none", [0.0, 0.0, 4.0, 0.0, 0.0, 1.0]),
        ("pass_at_k", "group", [0.0, 0.0, 4.0 / (STD_1 + 0.5), 0.0, 0.0, 1.0 / (STD_2 + 0.5)]),
    ],
)
def test_by_hand(estimator: AdvantageEstimator, scale: Scale, expected: list[float]):
    found = group_advantages(tensor(REWARDS), 3, estimator=estimator, scale=scale, lengths=tensor(LENGTHS), eps=0.5)
    assert found.tolist() == pytest.approx(expected, abs=1e-15)


def test_gdpo_by_hand():
    first, second = [0.0, 2.0, 5.0, 5.0], [1.0, 3.0, 0.0, 4.0]
    # Groups of two: +-1 / (sqrt 2 + eps) where they differ; the second group's first function does not.
    a, b = 1 / (math.sqrt(2) + 0.5), 2 / (math.sqrt(8) + 0.5)
    total = [-2 * a - 3 * a, 2 * a + 3 * a, -3 * b, 3 * b]
    std = math.sqrt(sum(x * x for x in total) / 3)
    found = gdpo_advantages(tensor([first, second]), [2.0, 3.0], 2, eps=0.5)
    assert found.tolist() == pytest.approx([x / (std + 0.5) for x in total], abs=1e-15)


def test_the_constant_is_one_millionth_by_default():
    rewards = tensor([0.0, 1e-6])
    std = 1e-6 / math.sqrt(2)
    assert group_advantages(rewards, 2).tolist() == pytest.approx([-5e-7 / (std + 1e-6), 5e-7 / (std + 1e-6)])
    trl = group_advantages(rewards, 2, eps=1e-4).tolist()
    assert trl == pytest.approx([-5e-7 / (std + 1e-4), 5e-7 / (std + 1e-4)])


# --- the peers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PEERS["expected"])
def test_peers(name: str):
    by_function = tensor(PEERS["rewards"]).T
    if name == "swift_gdpo":
        found = gdpo_advantages(by_function, PEERS["weights"], PEERS["G"])
    else:
        total = (by_function * tensor(PEERS["weights"])[:, None]).sum(dim=0)
        found = group_advantages(total, PEERS["G"], **of_peer(name))
    torch.testing.assert_close(found, tensor(PEERS["expected"][name]), rtol=0, atol=1e-14)


def of_peer(name: str) -> dict[str, Any]:
    """The arguments that compute what the peer did."""
    verl = {"rloo": ("rloo", "none"), "opo": ("opo", "none"), "grpo_passk": ("pass_at_k", "group")}
    if name.startswith("verl"):
        estimator, scale = verl[name.removeprefix("verl_compute_").removesuffix("_outcome_advantage")]
        return {"estimator": estimator, "scale": scale, "eps": 1e-6}
    estimator, _, scale = name.removeprefix("swift_").rpartition("_")
    return {"estimator": estimator, "scale": scale, "eps": 1e-4}


# --- a reference ----------------------------------------------------------------------------------------------------


def reference(
    rewards: list[float], lengths: list[int], size: int, estimator: str, scale: str, eps: float
) -> list[float]:
    """Exact fractions up to the last division; a missing reward is None."""
    exact = [None if math.isnan(reward) else Fraction(reward) for reward in rewards]
    unscaled: list[Fraction] = []
    for start in range(0, len(rewards), size):
        group, tokens = exact[start : start + size], lengths[start : start + size]
        known = [reward for reward in group if reward is not None]
        for place, reward in enumerate(group):
            if reward is None or len(set(known)) < 2:
                unscaled.append(Fraction(0))
                continue
            others = [r for i, r in enumerate(group) if i != place and r is not None]
            if estimator == "rloo":
                baseline = sum(others) / len(others)
            elif estimator == "opo":
                counted = [(r, n) for r, n in zip(group, tokens) if r is not None]
                baseline = sum(r * n for r, n in counted) / sum(n for _, n in counted)
            elif estimator == "pass_at_k":
                baseline = max(others) if reward > max(others) else reward
            else:
                baseline = sum(known) / len(known)
            unscaled.append(reward - baseline)
    result = []
    for place, advantage in enumerate(unscaled):
        start = place // size * size
        window = slice(start, start + size) if scale == "group" else slice(None)
        of = exact
        if estimator == "reinforce_plus_plus":
            of = [None if r is None else a for r, a in zip(exact, centred(exact, size))]
        known = [value for value in of[window] if value is not None]
        std = math.sqrt(statistics.variance(known)) + eps if scale != "none" and len(known) > 1 else 1.0
        result.append(float(advantage) / std if advantage else 0.0)
    return result


def centred(rewards: list[Fraction | None], size: int) -> list[Fraction]:
    result = []
    for place, reward in enumerate(rewards):
        start = place // size * size
        known = [r for r in rewards[start : start + size] if r is not None]
        result.append(Fraction(0) if reward is None else reward - sum(known) / len(known))
    return result


# Multiples of 1/8: equal rewards are drawn, and every sum is exact.
REWARD = st.integers(-16, 16).map(lambda n: n / 8) | st.just(NAN)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[float], list[int], int]:
    size, groups = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    count = size * groups
    rewards = draw(st.lists(REWARD, min_size=count, max_size=count))
    return rewards, draw(st.lists(st.integers(1, 40), min_size=count, max_size=count)), size


@pytest.mark.parametrize(("estimator", "scale"), CHOICES)
@REPEATABLE
@given(batch=batches())
def test_against_the_reference(estimator: AdvantageEstimator, scale: Scale, batch: tuple[list[float], list[int], int]):
    rewards, lengths, size = batch
    found = group_advantages(tensor(rewards), size, estimator=estimator, scale=scale, lengths=tensor(lengths))
    expected = reference(rewards, lengths, size, estimator, scale, 1e-6)
    torch.testing.assert_close(found, tensor(expected), rtol=1e-12, atol=1e-12)
    assert [value == 0 for value in found.tolist()] == [value == 0 for value in expected] or scale == "batch"


@pytest.mark.parametrize(("estimator", "scale"), CHOICES)
@REPEATABLE
@given(batch=batches(), shift=st.integers(-40, 40), factor=st.sampled_from([0.25, 2.0, 8.0]))
def test_shifted_and_scaled_rewards(
    estimator: AdvantageEstimator, scale: Scale, batch: tuple[list[float], list[int], int], shift: int, factor: float
):
    """A shift changes nothing; a factor nothing where advantages are divided by a spread, else it goes through."""
    rewards, lengths, size = batch

    def advantages(values: Tensor) -> Tensor:
        how = {"estimator": estimator, "scale": scale, "lengths": tensor(lengths), "eps": 0.0}
        return group_advantages(values, size, **how)

    plain = advantages(tensor(rewards))
    torch.testing.assert_close(advantages(tensor(rewards) + shift), plain, rtol=1e-11, atol=1e-11)
    through = factor if scale == "none" else 1.0
    torch.testing.assert_close(advantages(factor * tensor(rewards)), through * plain, rtol=1e-11, atol=1e-11)


@REPEATABLE
@given(batch=batches(), shift=st.integers(-40, 40))
def test_gdpo_does_not_see_shifts_and_scales_of_a_function(batch: tuple[list[float], list[int], int], shift: int):
    rewards, lengths, size = batch
    first, second = tensor(rewards), tensor(lengths)
    plain = gdpo_advantages(torch.stack([first, second]), [1.0, 0.5], size, eps=0.0)
    other = gdpo_advantages(torch.stack([4 * first + shift, second]), [1.0, 0.5], size, eps=0.0)
    torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-9, equal_nan=True)


# --- what teaches nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("estimator", "scale"), CHOICES)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -2.3, 1e6 + 0.1, 1e60])
def test_equal_rewards_have_exactly_no_advantage(estimator: AdvantageEstimator, scale: Scale, reward: float):
    lengths = tensor([3.0, 7.0, 11.0, 1.0, 2.0, 3.0])
    alone = group_advantages(tensor([reward] * 6), 3, estimator=estimator, scale=scale, lengths=lengths)
    assert alone.tolist() == [0.0] * 6
    beside = group_advantages(
        tensor([reward] * 3 + [0.0, 1.0, 2.5]), 3, estimator=estimator, scale=scale, lengths=lengths
    )
    assert beside[:3].tolist() == [0.0] * 3 and beside[5] > 0


@pytest.mark.parametrize(("estimator", "scale"), CHOICES)
@pytest.mark.parametrize("rewards", [[NAN] * 4, [1.0, NAN, NAN, NAN], [NAN, 2.0, 2.0, NAN]])
def test_too_few_rewards_have_no_advantage(estimator: AdvantageEstimator, scale: Scale, rewards: list[float]):
    assert group_advantages(tensor(rewards), 4, estimator=estimator, scale=scale).tolist() == [0.0] * 4
    assert group_advantages(tensor(rewards), 2, estimator=estimator, scale=scale).tolist() == [0.0] * 4
    assert group_advantages(tensor(rewards), 1, estimator=estimator, scale=scale).tolist() == [0.0] * 4
    assert zero_std_fraction(tensor(rewards), 2) == 1.0


def test_gdpo_of_what_teaches_nothing():
    equal, missing = [1 / 3] * 4, [NAN] * 4
    assert gdpo_advantages(tensor([equal, equal]), [1.0, 1.0], 2).tolist() == [0.0] * 4
    assert gdpo_advantages(tensor([missing, missing]), [1.0, 1.0], 2).tolist() == [0.0] * 4
    # Two functions that cancel, a group that is equal, beside one that teaches.
    rewards = tensor([[1.0, 0.0, 0.1, 0.1, 0.0, 1.0], [0.0, 1.0, 0.7, 0.7, 0.0, 1.0]])
    found = gdpo_advantages(rewards, [1.0, 1.0], 2).tolist()
    assert found[2:4] == [0.0, 0.0]
    assert found[:2] == pytest.approx([0.0, 0.0], abs=1e-15) and found[5] == -found[4] > 0


def test_a_function_that_scores_nothing_of_a_group_adds_nothing_there():
    """As with functions of two tasks: each group is normalised by its own function."""
    rewards = tensor([[0.0, 2.0, NAN, NAN], [NAN, NAN, 0.0, 6.0]])
    alone = gdpo_advantages(tensor([[0.0, 2.0, 0.0, 6.0]]), [1.0], 2)
    assert gdpo_advantages(rewards, [1.0, 1.0], 2).tolist() == pytest.approx(alone.tolist(), abs=1e-7)


# --- what a configuration asks for ----------------------------------------------------------------------------------


def config(**groups: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "model": {"path": "m"},
        "data": {"dataset": "d"},
        "train": {"output_dir": "o", "global_batch_size": 4, "train_iters": 4},
        "rollout": {"num_generations": 2},
    }
    return Config.model_validate({name: {**base.get(name, {}), **groups.get(name, {})} for name in {*base, *groups}})


def scored(rewards: dict[str, list[float]], total: list[float], lengths: list[int]) -> ScoredRollouts:
    """Completions of these lengths behind one token of prompt."""
    rollouts = tuple(
        RolloutSample(i, i, torch.zeros(n + 1), torch.arange(n + 1) > 0, torch.zeros(n + 1), 0, "stop")
        for i, n in enumerate(lengths)
    )
    by_function = {name: tuple(values) for name, values in rewards.items()}
    return ScoredRollouts(
        (Prompt(0, "", (0,), ""),) * len(total), rollouts, tuple(total), by_function, (0,) * len(total)
    )


TOTAL = [0.0, 1.0, 2.0, 6.0, NAN, 3.0, 1.0, 4.0]
GENERATION = scored({"accuracy": TOTAL}, TOTAL, [1, 2, 3, 4, 5, 6, 7, 8])


@pytest.mark.parametrize(("estimator", "scale"), CHOICES)
def test_the_configuration_chooses(estimator: AdvantageEstimator, scale: Scale):
    found = advantages_of(GENERATION, config(grpo={"advantage_estimator": estimator, "scale_rewards": scale}))
    lengths = tensor([1, 2, 3, 4, 5, 6, 7, 8])
    expected = group_advantages(tensor(TOTAL), 2, estimator=estimator, scale=scale, lengths=lengths)
    assert torch.equal(found, expected)


def test_batch_statistics_are_those_of_the_generation_batch_and_not_of_a_step():
    """Two steps share it: the std is that of all seven rewards, whichever step a completion is learnt in."""
    grpo = {"scale_rewards": "batch", "steps_per_generation": 2}
    std = statistics.stdev([reward for reward in TOTAL if not math.isnan(reward)])
    found = advantages_of(GENERATION, config(grpo=grpo)).tolist()
    expected = [-0.5, 0.5, -2.0, 2.0, 0.0, 0.0, -1.5, 1.5]
    assert found == pytest.approx([value / (std + 1e-6) for value in expected], abs=1e-15)


def test_gdpo_takes_weights_and_leaves_the_unscorable_out():
    rewards = {"accuracy": [0.0, 1.0, 5.0, 2.0], "format": [1.0, 0.0, 0.0, 3.0]}
    batch = scored(rewards, [1.0, 1.0, NAN, 8.0], [1] * 4)
    settings = config(
        grpo={"scale_rewards": "gdpo"},
        rewards={"reward_funcs": ["accuracy", "format"], "reward_weights": [1.0, 3.0]},
    )
    found = advantages_of(batch, settings).tolist()
    # -1 + 3 and 1 - 3 over sqrt 2, and 0 of the fourth, which is alone in its group: their std is sqrt 2.
    assert found == pytest.approx([1.0, -1.0, 0.0, 0.0], abs=1e-7)
    assert found[2:] == [0.0, 0.0]


def test_what_is_usual_with_an_estimator():
    usual = {name: reward_scale(config(grpo={"advantage_estimator": name}).grpo) for name in ESTIMATORS}
    assert usual == {
        "grpo": "group",
        "rloo": "none",
        "reinforce_plus_plus": "batch",
        "opo": "none",
        "pass_at_k": "group",
    }
    assert reward_scale(config(grpo={"scale_rewards": "none"}).grpo) == "none"


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        (
            {"grpo": {"advantage_estimator": "opo", "scale_rewards": "group"}},
            "grpo.scale_rewards=group makes no sense with grpo.advantage_estimator=opo; set it to none",
        ),
        (
            {"grpo": {"advantage_estimator": "rloo", "scale_rewards": "gdpo"}},
            "grpo.scale_rewards=gdpo makes no sense with grpo.advantage_estimator=rloo; set it to none or group or "
            "batch",
        ),
        (
            {"rewards": {"soft_cache_length": 9}},
            "rewards.soft_cache_length=9 is not read by rewards.reward_funcs without soft_overlong; remove it",
        ),
        (
            {"rewards": {"reward_funcs": ["format"], "soft_max_length": 99}},
            "rewards.soft_max_length=99 is not read by rewards.reward_funcs without soft_overlong; remove it",
        ),
        (
            {"rewards": {"reward_funcs": ["soft_overlong"]}},
            "rewards.reward_funcs names soft_overlong, which needs rewards.soft_cache_length, the tokens over which it "
            "grows; set it",
        ),
        (
            {"rewards": {"reward_funcs": ["soft_overlong"], "soft_cache_length": 257}},
            "rewards.soft_cache_length=257 is above rollout.max_completion_length=256; lower it",
        ),
        (
            {"rewards": {"reward_funcs": ["soft_overlong"], "soft_cache_length": 9, "soft_max_length": 8}},
            "rewards.soft_cache_length=9 is above rewards.soft_max_length=8; lower it",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(groups: dict[str, dict[str, Any]], sentence: str):
    with pytest.raises(UserError) as error:
        check_rewards(config(**groups))
    assert str(error.value) == sentence


def test_the_longest_completion_is_the_rollouts_unless_it_is_set():
    assert reward_settings(config(rollout={"max_completion_length": 77}))["soft_max_length"] == 77
    assert reward_settings(config(rewards={"soft_max_length": 5}))["soft_max_length"] == 5
