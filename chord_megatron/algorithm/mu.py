"""Schedules of mu, the weight of the expert loss (CHORD, arXiv 2508.11408, section 4.1), and loops that control it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class StepHistory(NamedTuple):
    """What the steps so far measured, as exponential moving averages; None before the first measurement."""

    reward: float | None = None  # mean of the completions
    log_gradient_ratio: float | None = None  # log(|g_R| / |g_E|), of the two streams' own losses

    def observed(self, *, reward: float | None, norms: tuple[float, float] | None, smoothing: float) -> StepHistory:
        """The history after a step. `norms`: |g_R| and |g_E|; None, zero or not finite: the last average stays."""
        ratio = None
        if norms is not None and all(0 < norm < math.inf for norm in norms):
            ratio = math.log(norms[0]) - math.log(norms[1])
        return StepHistory(
            _moving_average(self.reward, reward, smoothing), _moving_average(self.log_gradient_ratio, ratio, smoothing)
        )


MuSchedule = Callable[[int, StepHistory], float]  # (0-based optimizer step, what came before it) -> mu in [0, 1]


def cosine(step: int, decay_steps: int) -> float:
    """The peak's share after `step` of the decay, 1 at first."""
    return (1 + math.cos(math.pi * step / decay_steps)) / 2


def linear(step: int, decay_steps: int) -> float:
    """As `cosine`, in a straight line."""
    return 1 - step / decay_steps


def mu_schedule(
    step: int,
    history: StepHistory | None = None,
    *,
    peak: float,
    valley: float,
    warmup_steps: int,
    decay_steps: int,
    decay: Callable[[int, int], float] = cosine,
) -> float:
    """mu at a 0-based optimizer step, whatever came before: linear warm-up to `peak`, decay to `valley`, `valley`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step < warmup_steps + decay_steps:
        peak_share = decay(step - warmup_steps, decay_steps)
        return peak * peak_share + valley * (1 - peak_share)  # exactly `peak` where the decay begins
    return valley


def mu_of_reward(step: int, history: StepHistory, *, target: float, start: float, valley: float, peak: float) -> float:
    """max(0, target - mean reward) of the steps before, within [valley, peak]: experts as far as rewards lack."""
    if history.reward is None:
        return start
    return min(max(0.0, target - history.reward, valley), peak)


def mu_of_gradient_ratio(
    step: int, history: StepHistory, *, target: float, start: float, valley: float, peak: float
) -> float:
    """The mu at which the expert stream has the share `target` of the gradient, within [valley, peak].

    mu |g_E| / ((1 - mu) |g_R| + mu |g_E|) = t  <=>  log(mu / (1 - mu)) = log(t / (1 - t)) + log(|g_R| / |g_E|)
    """
    if history.log_gradient_ratio is None:
        return start
    logit = math.log(target / (1 - target)) + history.log_gradient_ratio
    return min(max(1 / (1 + math.exp(-logit)), valley), peak)


def gradient_share(mu: float, rollout_norm: float, expert_norm: float) -> float | None:
    """mu |g_E| / ((1 - mu) |g_R| + mu |g_E|) of the gradients' norms; None where both parts are 0."""
    total = (1 - mu) * rollout_norm + mu * expert_norm
    return mu * expert_norm / total if total > 0 else None


def _moving_average(before: float | None, value: float | None, smoothing: float) -> float | None:
    if value is None or not math.isfinite(value):
        return before
    return value if before is None else smoothing * before + (1 - smoothing) * value
