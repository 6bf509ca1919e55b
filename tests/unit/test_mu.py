"""Schedules of mu and the loops that control it: by hand, against a naive loop, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chord_megatron.algorithm.mu import StepHistory, gradient_share, mu_of_gradient_ratio, mu_of_reward
from chord_megatron.config import Config
from chord_megatron.planning.schedule import check_mu_schedule, mu_at, mu_range
from chord_megatron.planning.streams import check_streams
from chord_megatron.system.errors import UserError
from chord_megatron.training.mu_control import MuControl
from chord_megatron.types import GradientComparison

REWARD = {"mu_schedule": "reward", "mu_target": 0.8, "chord_mu_peak": 0.9, "chord_mu_valley": 0.05}
RATIO = {"mu_schedule": "gradient_ratio", "mu_target": 0.3, "chord_mu_peak": 0.9, "chord_mu_valley": 0.05}
BOUNDS = {"start": 0.5, "valley": 0.05, "peak": 0.9}


def config_of(train_iters: int = 20, **chord: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "model"},
            "data": {"dataset": "prompts.jsonl"},
            "chord": {"chord_sft_dataset": "experts.jsonl", "chord_sft_global_batch_size": 4, **chord},
            "train": {"output_dir": "out", "global_batch_size": 8, "train_iters": train_iters},
        }
    )


def compared(norm_a: float, norm_b: float) -> GradientComparison:
    return GradientComparison(norm_a, norm_b, 0.0)


# --- open schedules -------------------------------------------------------------------------------------------------


def test_a_peak_below_the_valley_is_refused():
    ends = {"chord_mu_peak": 0.2, "chord_mu_valley": 0.3}
    for schedule in ("cosine", "linear"):
        with pytest.raises(UserError) as error:
            check_mu_schedule(config_of(mu_schedule=schedule, **ends, chord_mu_decay_steps=5))
        assert str(error.value) == (
            "chord.chord_mu_peak=0.2 is below chord.chord_mu_valley=0.3, to which mu decays; exchange them, or set the "
            "valley to at most the peak"
        )
    check_mu_schedule(config_of(chord_mu_peak=0.3, chord_mu_valley=0.3, chord_mu_decay_steps=5))


def test_a_peak_that_is_never_reached_is_refused():
    with pytest.raises(UserError) as error:
        check_mu_schedule(config_of(chord_mu_peak=0.9))
    assert str(error.value) == (
        "chord.chord_mu_peak=0.9 is never reached where chord.chord_mu_warmup_steps and chord.chord_mu_decay_steps are "
        "0: mu is chord.chord_mu_valley=0.05 throughout; set one of the lengths, or chord.mu_schedule=constant to stay "
        "at the peak"
    )
    check_mu_schedule(config_of(chord_mu_peak=0.9, chord_mu_valley=0.9))
    check_mu_schedule(config_of(mu_schedule="constant", chord_mu_peak=0.9))
    check_mu_schedule(config_of())  # the default peak: validate says that mu is the valley


def test_linear_by_hand():
    ends = {"chord_mu_peak": 0.9, "chord_mu_valley": 0.1, "chord_mu_warmup_steps": 2, "chord_mu_decay_steps": 4}
    config = config_of(mu_schedule="linear", **ends)
    expected = [0.0, 0.45, 0.9, 0.7, 0.5, 0.3, 0.1, 0.1]
    assert [mu_at(config, step) for step in range(8)] == pytest.approx(expected, abs=1e-15)
    assert mu_at(config, 2) == 0.9 and mu_at(config, 6) == 0.1


def test_constant_warms_up_to_the_peak_and_stays():
    config = config_of(mu_schedule="constant", chord_mu_peak=0.6, chord_mu_warmup_steps=2, chord_mu_decay_steps=3)
    assert [mu_at(config, step) for step in range(8)] == [0.0, 0.3, *[0.6] * 6]
    assert mu_range(config) == (0.0, 0.6) and mu_range(config, 2, 5) == (0.6, 0.6)


def test_cosine_is_the_default():
    assert config_of().chord.mu_schedule == "cosine"


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.tuples(st.integers(0, 5), st.integers(0, 5)),
    st.tuples(st.integers(0, 12), st.integers(1, 8)),
)
@settings(derandomize=True, max_examples=100, deadline=None)
def test_the_range_of_some_steps_is_that_of_each(
    schedule: str, ends: tuple[float, float], parts: tuple[int, int], span: tuple[int, int]
):
    config = config_of(
        mu_schedule=schedule,
        chord_mu_peak=ends[0],
        chord_mu_valley=ends[1],
        chord_mu_warmup_steps=parts[0],
        chord_mu_decay_steps=parts[1],
    )
    start, stop = span[0], sum(span)
    values = [mu_at(config, step) for step in range(start, stop)]
    lowest, highest = mu_range(config, start, stop)
    # Where a part ends, rounding may bend the curve by the last digit.
    assert lowest == pytest.approx(min(values), abs=1e-15) and highest == pytest.approx(max(values), abs=1e-15)
    assert (lowest < 1) == (min(values) < 1) and (highest > 0) == (max(values) > 0)


# --- closed loops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "mu"), [(None, 0.5), (0.3, 0.5), (0.75, 0.05), (0.8, 0.05), (1.5, 0.05), (-0.05, 0.85), (-3.0, 0.9)]
)
def test_mu_of_reward_by_hand(reward: float | None, mu: float):
    assert mu_of_reward(7, StepHistory(reward=reward), target=0.8, **BOUNDS) == pytest.approx(mu, abs=1e-15)


@pytest.mark.parametrize(
    ("norms", "mu"),
    [
        (None, 0.5),
        ((1.0, 1.0), 0.25),  # as large: the share is mu
        ((3.0, 1.0), 0.5),  # 0.25 * 3 / (0.75 * 1 + 0.25 * 3)
        ((1.0, 3.0), 0.1),  # 0.25 / (0.75 * 3 + 0.25)
        ((1e-30, 1e30), 0.05),
        ((1e30, 1e-30), 0.9),
    ],
)
def test_mu_of_gradient_ratio_by_hand(norms: tuple[float, float] | None, mu: float):
    history = StepHistory().observed(reward=None, norms=norms, smoothing=0.9)
    assert mu_of_gradient_ratio(7, history, target=0.25, **BOUNDS) == pytest.approx(mu, rel=1e-14)


@given(st.floats(0.001, 0.999), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(derandomize=True, max_examples=100)
def test_the_share_at_that_mu_is_the_target(target: float, rollout_norm: float, expert_norm: float):
    history = StepHistory().observed(reward=None, norms=(rollout_norm, expert_norm), smoothing=0.5)
    mu = mu_of_gradient_ratio(0, history, target=target, start=0.5, valley=0.0, peak=1.0)
    naive = target * rollout_norm / ((1 - target) * expert_norm + target * rollout_norm)
    assert mu == pytest.approx(naive, rel=1e-9)
    assert gradient_share(mu, rollout_norm, expert_norm) == pytest.approx(target, rel=1e-9)


def test_a_share_of_nothing_is_none():
    assert gradient_share(0.3, 0.0, 0.0) is None
    assert gradient_share(0.3, math.nan, 1.0) is None
    assert gradient_share(0.3, 0.0, 2.0) == 1.0


def test_history_is_a_moving_average():
    history = StepHistory()
    for reward, norms in ((1.0, (math.e, 1.0)), (0.0, (1.0, 1.0)), (1.0, (1.0, math.e))):
        history = history.observed(reward=reward, norms=norms, smoothing=0.75)
    # 1; 3/4; 9/16 + 1/4. 1; 3/4; 9/16 - 1/4.
    assert history == pytest.approx((0.8125, 0.3125), abs=1e-15)


@pytest.mark.parametrize("norms", [None, (0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)])
@pytest.mark.parametrize("reward", [None, math.nan, math.inf])
def test_what_is_no_number_leaves_the_last_average(norms: tuple[float, float] | None, reward: float | None):
    history = StepHistory(0.25, -1.5)
    assert history.observed(reward=reward, norms=norms, smoothing=0.5) == history
    assert StepHistory().observed(reward=reward, norms=norms, smoothing=0.5) == StepHistory()


def test_reward_follows_the_steps_before():
    control = MuControl(config_of(**REWARD, mu_start=0.3, mu_smoothing=0.5))
    seen = []
    for step, reward in enumerate((0.0, 0.4, None, 1.0, 1.0)):
        seen.append(control.at(step))
        control.observe(step, reward, None)
    # The average before each step: none, 0, 0.2, 0.2, 0.6.
    assert seen == pytest.approx([0.3, 0.8, 0.6, 0.6, 0.2], abs=1e-15)


def test_the_gradient_ratio_is_read_at_its_own_steps_only():
    """A diagnosis at other steps shows numbers and moves nothing."""
    control = MuControl(config_of(**RATIO, mu_update_steps=3, mu_smoothing=0.0))
    assert [control.measures_gradients(step) for step in range(5)] == [True, False, False, True, False]
    assert control.at(0) == 0.9  # no start: the peak
    control.observe(0, None, compared(2.0, 1.0))
    steered = control.at(1)
    assert steered == pytest.approx(0.6 / 1.3)
    control.observe(1, None, compared(9.0, 1.0))
    assert control.at(2) == steered
    control.observe(3, None, compared(0.0, 1.0))
    assert control.at(4) == steered


def test_other_schedules_ask_for_no_gradients():
    assert not any(MuControl(config_of(**chord)).measures_gradients(0) for chord in ({}, REWARD))


def test_a_control_goes_on_where_it_was():
    first, second = MuControl(config_of(**RATIO)), MuControl(config_of(**RATIO))
    for step, norms in enumerate(((2.0, 1.0), (0.3, 0.7))):
        first.observe(10 * step, 0.1 * step, compared(*norms))
    second.load_state_dict(first.state_dict())
    assert second.at(20) == first.at(20) and second.state_dict() == first.state_dict()
    second.load_state_dict({})
    assert second.at(20) == 0.9


@pytest.mark.parametrize("state", [{"reward": "1"}, {"reward": True}, {"other": 1.0}, {"log_gradient_ratio": [0.1]}])
def test_a_damaged_state_is_no_state(state: dict[str, Any]):
    with pytest.raises(TypeError):
        MuControl(config_of(**RATIO)).load_state_dict(state)


# --- what a run needs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chord", [REWARD, RATIO])
def test_a_closed_loop_needs_both_streams_throughout(chord: dict[str, Any]):
    config = config_of(**chord)
    check_mu_schedule(config)
    assert mu_range(config) == mu_range(config, 7, 8) == (0.05, 0.9)
    with pytest.raises(UserError, match="chord_sft_dataset is required while mu > 0"):
        check_streams(config_of(**chord, chord_sft_dataset=None))


def test_reward_may_leave_the_experts_out():
    check_mu_schedule(config_of(**{**REWARD, "chord_mu_valley": 0.0}))


@pytest.mark.parametrize(
    ("chord", "sentence"),
    [
        (
            {"mu_target": 0.5},
            "chord.mu_target=0.5 is not read by chord.mu_schedule=cosine; remove it",
        ),
        (
            {"mu_schedule": "linear", "mu_start": 0.5},
            "chord.mu_start=0.5 is not read by chord.mu_schedule=linear; remove it",
        ),
        ({"mu_smoothing": 0.5}, "chord.mu_smoothing=0.5 is not read by chord.mu_schedule=cosine; remove it"),
        (
            {**REWARD, "mu_update_steps": 5},
            "chord.mu_update_steps=5 is not read by chord.mu_schedule=reward; remove it",
        ),
        (
            {"mu_schedule": "constant", "chord_mu_decay_steps": 60},
            "chord.chord_mu_decay_steps=60 is not read by chord.mu_schedule=constant; remove it",
        ),
        (
            {"mu_schedule": "constant", "chord_mu_valley": 0.1},
            "chord.chord_mu_valley=0.1 is not read by chord.mu_schedule=constant; remove it",
        ),
        ({**REWARD, "mu_target": None}, "chord.mu_schedule=reward needs chord.mu_target, a reward"),
        (
            {**RATIO, "mu_target": None},
            "chord.mu_schedule=gradient_ratio needs chord.mu_target, a share of the gradient",
        ),
        (
            {**RATIO, "mu_target": 1.0},
            "chord.mu_target=1 is the expert stream's share of the gradient under chord.mu_schedule=gradient_ratio; "
            "set it between 0.001 and 0.999",
        ),
        (
            {**REWARD, "chord_mu_decay_steps": 5},
            "chord.chord_mu_decay_steps=5 is not read by chord.mu_schedule=reward; remove it",
        ),
        (
            {**REWARD, "mu_start": 0.95},
            "chord.mu_schedule=reward keeps mu between chord.chord_mu_valley=0.05 and chord.chord_mu_peak=0.9; set the "
            "valley to at most the peak, and chord.mu_start between them or to null",
        ),
        (
            {**REWARD, "chord_mu_valley": 0.95},
            "chord.mu_schedule=reward keeps mu between chord.chord_mu_valley=0.95 and chord.chord_mu_peak=0.9; set the "
            "valley to at most the peak, and chord.mu_start between them or to null",
        ),
        (
            {**REWARD, "chord_mu_peak": 1.0},
            "chord.mu_schedule=reward measures rollouts, and at mu = 1 there are no rollouts, at mu = 0 no experts; "
            "set chord.chord_mu_peak below 1",
        ),
        (
            {**RATIO, "chord_mu_valley": 0.0},
            "chord.mu_schedule=gradient_ratio measures both streams, and at mu = 1 there are no rollouts, at mu = 0 no "
            "experts; set chord.chord_mu_peak below 1 and chord.chord_mu_valley above 0",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(chord: dict[str, Any], sentence: str):
    with pytest.raises(UserError) as error:
        check_mu_schedule(config_of(**chord))
    assert str(error.value) == sentence
