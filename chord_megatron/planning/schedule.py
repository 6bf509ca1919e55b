"""What follows the step number, as the configuration has it."""

from __future__ import annotations

from functools import partial

from chord_megatron.algorithm.mu import (
    MuSchedule,
    StepHistory,
    cosine,
    linear,
    mu_of_gradient_ratio,
    mu_of_reward,
    mu_schedule,
)
from chord_megatron.algorithm.presets import SEMANTICS
from chord_megatron.config import ChordConfig, Config
from chord_megatron.planning.unread import refuse_unread
from chord_megatron.system.errors import UserError

CLOSED_LOOPS = {"reward": mu_of_reward, "gradient_ratio": mu_of_gradient_ratio}
_LOWEST_SHARE = 0.001  # of the gradient, that a loop holds; and 1 minus this
_NOTHING_YET = StepHistory()

_STEPS, _LOOP = ("chord_mu_warmup_steps", "chord_mu_decay_steps"), ("mu_target", "mu_start", "mu_smoothing")
# The keys of mu that a schedule does not read.
_UNREAD = {
    "cosine": (*_LOOP, "mu_update_steps"),
    "linear": (*_LOOP, "mu_update_steps"),
    "constant": (*_LOOP, "mu_update_steps", "chord_mu_decay_steps", "chord_mu_valley"),
    "reward": (*_STEPS, "mu_update_steps"),
    "gradient_ratio": _STEPS,
}


def build_mu_schedule(chord: ChordConfig) -> MuSchedule:
    """The schedule that chord.mu_schedule names."""
    peak, valley = chord.chord_mu_peak, chord.chord_mu_valley
    if chord.mu_schedule in CLOSED_LOOPS:
        assert chord.mu_target is not None
        law = CLOSED_LOOPS[chord.mu_schedule]
        return partial(law, target=chord.mu_target, start=mu_start(chord), valley=valley, peak=peak)
    is_constant = chord.mu_schedule == "constant"
    return partial(
        mu_schedule,
        peak=peak,
        valley=peak if is_constant else valley,
        warmup_steps=chord.chord_mu_warmup_steps,
        decay_steps=0 if is_constant else chord.chord_mu_decay_steps,
        decay=linear if chord.mu_schedule == "linear" else cosine,
    )


def mu_start(chord: ChordConfig) -> float:
    """mu of a closed loop before it has measured anything."""
    return chord.chord_mu_peak if chord.mu_start is None else chord.mu_start


def mu_at(config: Config, step: int, history: StepHistory = _NOTHING_YET) -> float:
    """mu of the configured schedule at a 0-based optimizer step. Closed loops start where there is no history."""
    first_step = SEMANTICS[config.chord.semantics].first_step
    return build_mu_schedule(config.chord)(step + first_step, history)


def needs_rollouts(config: Config, start: int = 0, stop: int | None = None) -> bool:
    """Whether one of the steps [start, stop) may draw completions; stop: None = the run's end."""
    return SEMANTICS[config.chord.semantics].draws_rollouts_at_1 or mu_range(config, start, stop)[0] < 1


def mu_range(config: Config, start: int = 0, stop: int | None = None) -> tuple[float, float]:
    """The smallest and the largest mu that the steps [start, stop) may have; stop: None = the run's end.

    Between the ends of its parts an open schedule rises or falls.
    """
    chord, stop = config.chord, config.train.train_iters if stop is None else stop
    if chord.mu_schedule in CLOSED_LOOPS:
        return chord.chord_mu_valley, chord.chord_mu_peak
    peak_step = chord.chord_mu_warmup_steps - SEMANTICS[chord.semantics].first_step
    borders = (start, peak_step, peak_step + chord.chord_mu_decay_steps, stop)
    values = [mu_at(config, step) for border in borders for step in (border - 1, border) if start <= step < stop]
    return min(values), max(values)


def check_mu_schedule(config: Config) -> None:
    """That the keys of mu belong to its schedule, and that a closed loop can measure what it follows."""
    chord = config.chord
    refuse_unread("chord", chord, _UNREAD[chord.mu_schedule], f"chord.mu_schedule={chord.mu_schedule}")
    if chord.mu_schedule in CLOSED_LOOPS:
        _check_closed_loop(chord)
    elif chord.mu_schedule != "constant":
        _check_decay(chord)


def _check_decay(chord: ChordConfig) -> None:
    """That there is one, from the peak down to the valley."""
    peak, valley = chord.chord_mu_peak, chord.chord_mu_valley
    if is_valley_throughout(chord):
        if peak not in (valley, ChordConfig.model_fields["chord_mu_peak"].default):
            raise UserError(
                f"chord.chord_mu_peak={peak:g} is never reached where chord.chord_mu_warmup_steps and "
                f"chord.chord_mu_decay_steps are 0: mu is chord.chord_mu_valley={valley:g} throughout; set one of the "
                "lengths, or chord.mu_schedule=constant to stay at the peak"
            )
    elif peak < valley:
        raise UserError(
            f"chord.chord_mu_peak={peak:g} is below chord.chord_mu_valley={valley:g}, to which mu decays; exchange "
            "them, or set the valley to at most the peak"
        )


def is_valley_throughout(chord: ChordConfig) -> bool:
    """Whether mu never leaves the valley, because there is neither warm-up nor decay."""
    has_lengths = chord.chord_mu_warmup_steps or chord.chord_mu_decay_steps
    return chord.mu_schedule in ("cosine", "linear") and not has_lengths


def _check_closed_loop(chord: ChordConfig) -> None:
    name, follows_ratio = f"chord.mu_schedule={chord.mu_schedule}", chord.mu_schedule == "gradient_ratio"
    peak, valley, target = chord.chord_mu_peak, chord.chord_mu_valley, chord.mu_target
    if target is None:
        raise UserError(f"{name} needs chord.mu_target, {'a share of the gradient' if follows_ratio else 'a reward'}")
    if follows_ratio and not _LOWEST_SHARE <= target <= 1 - _LOWEST_SHARE:
        raise UserError(
            f"chord.mu_target={target:g} is the expert stream's share of the gradient under {name}; set it between "
            f"{_LOWEST_SHARE} and {1 - _LOWEST_SHARE}"
        )
    if not valley <= mu_start(chord) <= peak:
        raise UserError(
            f"{name} keeps mu between chord.chord_mu_valley={valley:g} and chord.chord_mu_peak={peak:g}; set the "
            "valley to at most the peak, and chord.mu_start between them or to null"
        )
    if peak == 1 or (follows_ratio and valley == 0):
        what, and_valley = "rollouts", ""
        if follows_ratio:
            what, and_valley = "both streams", " and chord.chord_mu_valley above 0"
        raise UserError(
            f"{name} measures {what}, and at mu = 1 there are no rollouts, at mu = 0 no experts; set "
            f"chord.chord_mu_peak below 1{and_valley}"
        )
