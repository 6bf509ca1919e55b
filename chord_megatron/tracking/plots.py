"""The panels of a run: one per question, the same colour for the same thing in all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from chord_megatron.tracking.drawing import (
    BLUE,
    GOLD,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    Panel,
    draw_picture,
    right_axis,
)
from chord_megatron.tracking.findings import findings
from chord_megatron.tracking.summary import History, eval_points
from chord_megatron.tracking.timers import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASE_COLORS = dict(zip(PHASES, (BLUE, GREEN, PURPLE, ORANGE, GOLD), strict=True))
FEW_STEPS = 25  # up to here each step gets a marker, beyond it lines are smoothed


def draw_history(history: History, title: str) -> bytes:
    """The panels of a run as one PNG, with what they suggest below them."""
    panels = run_panels(history)
    said = findings(history.steps) if panels else ["nothing is recorded yet"]
    return draw_picture(panels, title, "\n".join(said))


def run_panels(history: History) -> list[Panel]:
    """Those that have something to show."""
    span = _step_span(history)

    def panel(title: str, draw: Callable[[Axes, History], None]) -> Panel:
        def draw_within_span(axis: Axes) -> None:
            draw(axis, history)
            axis.set_xlim(*span)

        return Panel(title, draw_within_span)

    has_kl = bool(history.known("kl"))
    rows: tuple[tuple[str, Callable[[Axes, History], None], Sequence[object]], ...] = (
        ("Reward", _reward, (*history.known("reward_mean"), *eval_points(history))),
        ("Loss", _losses, history.known("loss")),
        ("Expert weight", _mixture, history.known("mu") + history.known("phi_mean")),
        ("Entropy and KL" if has_kl else "Entropy", _entropy, _known(history, "entropy", "expert_entropy", "kl")),
        ("Completions", _lengths, _known(history, "response_length_mean", "truncated_fraction")),
        ("Gradient norm", _grad_norm, _known(history, "grad_norm", "grad_norm_rollout", "grad_norm_expert")),
        ("Sampler vs trainer", _log_prob_difference, _known(history, "log_prob_diff_max", "log_prob_diff_mean")),
        ("Time of a step", _time_split, _known(history, "time_step", *(f"time_{phase}" for phase in PHASES))),
        ("Throughput", _throughput, history.known("tokens_per_second")),
    )
    return [panel(title, draw) for title, draw, known in rows if known]


def _reward(axis: Axes, history: History) -> None:
    axis.set_ylabel("mean reward")
    _line(axis, history, "reward_mean", "training rollouts", BLUE)
    points = eval_points(history)
    if points:
        steps, rewards = [p.step for p in points], [p.reward for p in points]
        axis.plot(steps, rewards, "D--", color=RED, markersize=5, linewidth=1, label="held-out eval", zorder=3)


def _losses(axis: Axes, history: History) -> None:
    axis.set_ylabel("loss per token")
    for stream, label, color in (("rollout", "rollout (GRPO)", BLUE), ("expert", "expert (SFT)", ORANGE)):
        tokens = history.known(f"num_{stream}_tokens")
        if any(tokens) or not tokens:  # without a token its loss is logged as 0, which is no measurement
            _line(axis, history, f"loss_{stream}", label, color)
    _line(axis, history, "loss", "total", INK)


def _mixture(axis: Axes, history: History) -> None:
    axis.set_ylabel("weight")
    _line(axis, history, "mu", "mu", ORANGE, smooth=False)
    _line(axis, history, "phi_mean", "mean phi", PURPLE)


def _entropy(axis: Axes, history: History) -> None:
    axis.set_ylabel("entropy (nats)")
    _line(axis, history, "entropy", "rollouts", BLUE)
    _line(axis, history, "expert_entropy", "experts", ORANGE)
    if history.known("kl"):
        _line(right_axis(axis, "KL to reference (nats)", RED), history, "kl", "KL (right)", RED)


def _lengths(axis: Axes, history: History) -> None:
    axis.set_ylabel("mean length (tokens)")
    _line(axis, history, "response_length_mean", "length", BLUE)
    if history.known("truncated_fraction"):
        right = right_axis(axis, "truncated fraction", RED)
        right.set_ylim(-0.02, 1.02)
        _line(right, history, "truncated_fraction", "truncated (right)", RED)


def _grad_norm(axis: Axes, history: History) -> None:
    axis.set_ylabel("L2 norm before clipping")
    _line(axis, history, "grad_norm", "both", INK)
    _points(axis, history, "grad_norm_rollout", "rollout", BLUE)
    _points(axis, history, "grad_norm_expert", "expert", ORANGE)
    if history.known("gradient_cosine"):
        right = right_axis(axis, "cosine of the two", GREEN)
        right.set_ylim(-1.02, 1.02)
        _points(right, history, "gradient_cosine", "cosine (right)", GREEN)


def _log_prob_difference(axis: Axes, history: History) -> None:
    axis.set_ylabel("|log-prob difference| (nats)")
    _line(axis, history, "log_prob_diff_max", "max", RED)
    _line(axis, history, "log_prob_diff_mean", "mean", BLUE)
    values = history.known("log_prob_diff_max") + history.known("log_prob_diff_mean")
    if values and min(values) > 0:
        axis.set_yscale("log")
    if history.known("effective_sample_size"):
        right = right_axis(axis, "effective sample size", GREEN)
        right.set_ylim(-0.02, 1.02)
        _line(right, history, "effective_sample_size", "effective (right)", GREEN)


def _time_split(axis: Axes, history: History) -> None:
    axis.set_ylabel("seconds")
    if not history.steps:
        return
    steps = [record["step"] for record in history.steps]
    edges = [step - 0.5 for step in steps] + [steps[-1] + 0.5]
    below = [0.0] * len(steps)

    def stack(low: list[float], high: list[float], color: str, label: str) -> None:
        ends = [*low, low[-1]], [*high, high[-1]]
        # Of 10,000 steps several times as fast as axis.stairs.
        axis.fill_between(edges, *ends, step="post", color=color, linewidth=0, label=label)

    for phase, color in PHASE_COLORS.items():
        if any(history.known(f"time_{phase}")):
            seconds = (0.0 if math.isnan(s) else s for s in history.column(f"time_{phase}"))
            top = [low + s for low, s in zip(below, seconds, strict=True)]
            stack(below, top, color, phase)
            below = top
    # max() keeps `low`, its first argument, where the total is NaN.
    top = [max(low, total) for low, total in zip(below, history.column("time_step"), strict=True)]
    if any(high > low for high, low in zip(top, below, strict=True)):
        stack(below, top, GREY, "other")
    axis.set_ylim(bottom=0)


def _throughput(axis: Axes, history: History) -> None:
    axis.set_ylabel("tokens per second")
    _line(axis, history, "tokens_per_second", "tokens/s", BLUE)
    if history.known("tokens_per_second"):
        axis.set_ylim(bottom=0)


def _line(axis: Axes, history: History, key: str, label: str, color: str, *, smooth: bool = True) -> None:
    """A metric over the steps; a long run shows its running mean over the faint raw values."""
    if not history.known(key):
        return
    steps, values = [record["step"] for record in history.steps], history.column(key)
    if len(steps) <= FEW_STEPS:
        axis.plot(steps, values, "o-", color=color, markersize=3.5, linewidth=1.5, label=label)
        return
    if smooth:
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        values = running_mean(values, reach=max(2, len(values) // 50))
    axis.plot(steps, values, color=color, linewidth=1.7, label=label)


def _points(axis: Axes, history: History, key: str, label: str, color: str) -> None:
    """A metric that is measured at some steps only."""
    known = [(record["step"], value) for record, value in zip(history.steps, history.column(key))]
    known = [(step, value) for step, value in known if not math.isnan(value)]
    if known:
        axis.plot(*zip(*known), "o-", color=color, markersize=3, linewidth=1.2, label=label)


def running_mean(values: list[float], reach: int) -> list[float]:
    """The mean of each value and its `reach` neighbours on both sides, without NaNs; NaN stays NaN."""
    import numpy as np

    numbers = np.array(values, dtype=float)
    is_known = ~np.isnan(numbers)
    window = np.ones(2 * reach + 1)
    # Beyond both ends the full convolution sees zeros, which count for nothing.
    sums, counts = (np.convolve(x, window)[reach : reach + len(x)] for x in (np.where(is_known, numbers, 0), is_known))
    return list(np.where(is_known, sums / np.maximum(counts, 1), math.nan))


def _step_span(history: History) -> tuple[float, float]:
    steps = [record["step"] for record in (*history.steps, *history.evaluations)]
    margin = max(0.5, 0.02 * (max(steps) - min(steps)))
    return min(steps) - margin, max(steps) + margin


def _known(history: History, *keys: str) -> list[float]:
    return [value for key in keys for value in history.known(key)]
