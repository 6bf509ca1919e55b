"""The figure of the report: one panel per question, the same colour for the same thing in all of them."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from chord_megatron.tracking.findings import findings
from chord_megatron.tracking.summary import History, eval_points
from chord_megatron.tracking.timers import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, RED, GOLD = "#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#c53030", "#d69e2e"
INK, MUTED, GREY, GRID = "#1a202c", "#718096", "#cbd5e0", "#e2e8f0"
PHASE_COLORS = dict(zip(PHASES, (BLUE, GREEN, PURPLE, ORANGE, GOLD), strict=True))

FEW_STEPS = 25  # up to here each step gets a marker, beyond it lines are smoothed
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.0,
    "legend.borderaxespad": 0.2,
}


def draw_history(history: History, title: str) -> bytes:
    """The nine panels of a run as a PNG, with what they suggest below them."""
    import matplotlib as mpl  # half a second that only the report pays
    from matplotlib.figure import Figure

    panels = (
        _reward,
        _losses,
        _mixture,
        _entropy,
        _lengths,
        _grad_norm,
        _log_prob_difference,
        _time_split,
        _throughput,
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15, 10.5), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
        figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)
        for axis, panel in zip(figure.subplots(3, 3).flat, panels, strict=True):
            panel(axis, history)
            _finish(axis, _step_span(history))
        if said := findings(history.steps):
            figure.supxlabel("\n".join(said), x=0.01, ha="left", fontsize=10, parse_math=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _reward(axis: Axes, history: History) -> None:
    axis.set(title="Reward", ylabel="mean reward")
    _line(axis, history, "reward_mean", "training rollouts", BLUE)
    points = eval_points(history)
    if points:
        steps, rewards = [p.step for p in points], [p.reward for p in points]
        axis.plot(steps, rewards, "D--", color=RED, markersize=5, linewidth=1, label="held-out eval", zorder=3)


def _losses(axis: Axes, history: History) -> None:
    axis.set(title="Loss", ylabel="loss per token")
    _line(axis, history, "loss_rollout", "rollout (GRPO)", BLUE)
    _line(axis, history, "loss_expert", "expert (SFT)", ORANGE)
    _line(axis, history, "loss", "total", INK)


def _mixture(axis: Axes, history: History) -> None:
    axis.set(title="Expert weight", ylabel="weight")
    _line(axis, history, "mu", "mu", ORANGE, smooth=False)
    _line(axis, history, "phi_mean", "mean phi", PURPLE)


def _entropy(axis: Axes, history: History) -> None:
    axis.set(title="Entropy", ylabel="entropy (nats)")
    _line(axis, history, "entropy", "rollouts", BLUE)
    _line(axis, history, "expert_entropy", "experts", ORANGE)
    if history.known("kl"):
        axis.set_title("Entropy and KL")
        _line(_right_axis(axis, "KL to reference (nats)", RED), history, "kl", "KL (right)", RED)


def _lengths(axis: Axes, history: History) -> None:
    axis.set(title="Completions", ylabel="mean length (tokens)")
    _line(axis, history, "response_length_mean", "length", BLUE)
    if history.known("truncated_fraction"):
        right = _right_axis(axis, "truncated fraction", RED)
        right.set_ylim(-0.02, 1.02)
        _line(right, history, "truncated_fraction", "truncated (right)", RED)


def _grad_norm(axis: Axes, history: History) -> None:
    axis.set(title="Gradient norm", ylabel="L2 norm before clipping")
    _line(axis, history, "grad_norm", "both", INK)
    _points(axis, history, "grad_norm_rollout", "rollout", BLUE)
    _points(axis, history, "grad_norm_expert", "expert", ORANGE)
    if history.known("gradient_cosine"):
        right = _right_axis(axis, "cosine of the two", GREEN)
        right.set_ylim(-1.02, 1.02)
        _points(right, history, "gradient_cosine", "cosine (right)", GREEN)


def _log_prob_difference(axis: Axes, history: History) -> None:
    axis.set(title="Sampler vs trainer", ylabel="|log-prob difference| (nats)")
    _line(axis, history, "log_prob_diff_max", "max", RED)
    _line(axis, history, "log_prob_diff_mean", "mean", BLUE)
    values = history.known("log_prob_diff_max") + history.known("log_prob_diff_mean")
    if values and min(values) > 0:
        axis.set_yscale("log")
    if history.known("effective_sample_size"):
        right = _right_axis(axis, "effective sample size", GREEN)
        right.set_ylim(-0.02, 1.02)
        _line(right, history, "effective_sample_size", "effective (right)", GREEN)


def _time_split(axis: Axes, history: History) -> None:
    axis.set(title="Time of a step", ylabel="seconds")
    if not history.steps:
        return
    steps = [record["step"] for record in history.steps]
    edges = [step - 0.5 for step in steps] + [steps[-1] + 0.5]
    below = [0.0] * len(steps)
    for phase, color in PHASE_COLORS.items():
        if any(history.known(f"time_{phase}")):
            seconds = (0.0 if math.isnan(s) else s for s in history.column(f"time_{phase}"))
            top = [low + s for low, s in zip(below, seconds, strict=True)]
            axis.stairs(top, edges, baseline=below, fill=True, color=color, label=phase)
            below = top
    # max() keeps `low`, its first argument, where the total is NaN.
    top = [max(low, total) for low, total in zip(below, history.column("time_step"), strict=True)]
    if any(high > low for high, low in zip(top, below, strict=True)):
        axis.stairs(top, edges, baseline=below, fill=True, color=GREY, label="other")


def _throughput(axis: Axes, history: History) -> None:
    axis.set(title="Throughput", ylabel="tokens per second")
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
    means = []
    for centre, value in enumerate(values):
        known = [v for v in values[max(0, centre - reach) : centre + reach + 1] if not math.isnan(v)]
        means.append(math.nan if math.isnan(value) else sum(known) / len(known))
    return means


def _right_axis(axis: Axes, label: str, color: str) -> Axes:
    right = axis.twinx()
    right.set_ylabel(label, color=color)
    right.tick_params(axis="y", colors=color)
    right.spines["right"].set(visible=True, color=color)
    return right


def _finish(axis: Axes, span: tuple[float, float]) -> None:
    """Common step axis, grid, and the legend beside the title; a panel without data says so."""
    from matplotlib.ticker import MaxNLocator

    right = [other for other in axis.get_shared_x_axes().get_siblings(axis) if other is not axis]
    handles = [handle for each in (axis, *right) for handle in each.get_legend_handles_labels()[0]]
    axis.set_xlim(*span)
    if not handles:
        axis.set(xticks=[], yticks=[], ylabel="")
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", va="center", color=MUTED)
        return
    axis.grid(True)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    if len(handles) > 1:
        axis.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def _step_span(history: History) -> tuple[float, float]:
    steps = [record["step"] for record in (*history.steps, *history.evaluations)]
    margin = max(0.5, 0.02 * (max(steps) - min(steps)))
    return min(steps) - margin, max(steps) + margin
