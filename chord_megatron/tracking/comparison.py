"""Several runs beside one another: those that differ in their seed alone as one, what else differs, curves. Pure."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from chord_megatron.system.sentences import shown
from chord_megatron.tracking.drawing import NUM_HUES, Panel
from chord_megatron.tracking.plots import FEW_STEPS, running_mean
from chord_megatron.tracking.summary import History, Summary, eval_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEED = "train.seed"
# What no two runs that are kept have in common: where they write.
_PLACES = ("train.output_dir", "rollout.record_to")
_DASHES = ("-", "--", ":")
_LONGEST_VALUE = 20_000  # parts of a value as JSON: aliases of aliases in YAML have no end
CURVES = {
    "reward_mean": "Reward of training rollouts",
    "eval_reward_mean": "Held-out reward",
    "loss": "Loss",
    "loss_rollout": "Loss of rollouts (GRPO)",
    "loss_expert": "Loss of experts (SFT)",
    "mu": "mu",
    "phi_mean": "Mean phi",
    "entropy": "Entropy (nats)",
    "kl": "KL to reference (nats)",
    "response_length_mean": "Completion length (tokens)",
    "truncated_fraction": "Truncated completions",
    "grad_norm": "Gradient norm",
    "effective_sample_size": "Effective sample size",
    "tokens_per_second": "Tokens per second",
    "time_step": "Seconds per step",
}
Curve = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Run:
    """One run: its name on the page, what config.yaml says by dotted key ({}: unknown), its log."""

    name: str
    settings: Mapping[str, Any]
    history: History
    summary: Summary


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    runs: tuple[Run, ...]
    place: int

    @property
    def name(self) -> str:
        """The first one's, with the number of runs where there are several."""
        return self.runs[0].name if len(self.runs) == 1 else f"{self.runs[0].name} ({len(self.runs)} runs)"

    @property
    def hue(self) -> int:
        """The place of its colour."""
        return self.place % NUM_HUES

    @property
    def dashes(self) -> int:
        """Which kind of line: another one where the colours begin anew."""
        return self.place // NUM_HUES % len(_DASHES)

    @property
    def line(self) -> tuple[str, str]:
        """Colour and line style, for Matplotlib."""
        return f"C{self.hue}", _DASHES[self.dashes]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """In the order of their first run. A run whose configuration is unknown is alone."""
    groups: dict[object, list[Run]] = {}
    for place, run in enumerate(runs):
        known = tuple(sorted((key, as_text(value)) for key, value in _compared(run).items()))
        groups.setdefault(known if run.settings else place, []).append(run)
    return [Group(tuple(members), place) for place, members in enumerate(groups.values())]


def differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Each key in which the groups' known configurations differ, with the value of each group; "" where it has none."""
    settings = [_compared(group.runs[0]) for group in groups]
    keys = dict.fromkeys(itertools.chain.from_iterable(settings))
    rows = [(key, [as_text(known[key]) if key in known else "" for known in settings]) for key in keys]
    return [(key, texts) for key, texts in rows if len({text for text, s in zip(texts, settings) if s}) > 1]


def as_text(value: Any) -> str:
    """A value of a configuration, as JSON, text without quotes; bounded."""
    if isinstance(value, str):
        return value
    try:
        return "".join(itertools.islice(json.JSONEncoder(ensure_ascii=False).iterencode(value), _LONGEST_VALUE))
    except ValueError:  # an alias within what it stands for
        return shown(value)


def comparison_panels(groups: Sequence[Group]) -> list[Panel]:
    """The curves that at least one run has."""
    shown = []
    for key, title in CURVES.items():
        curves = [[curve for run in group.runs if (curve := curve_of(run.history, key))[0]] for group in groups]
        if any(curves):
            shown.append(Panel(title, partial(_draw, groups=groups, curves=curves)))
    return shown


def curve_of(history: History, key: str) -> Curve:
    """The steps at which a metric is known, and its values there; a long one is smoothed, as in the report."""
    if key == "eval_reward_mean":
        points = eval_points(history)
        return [point.step for point in points], [point.reward for point in points]
    # A stream without a token has the loss 0, which is no measurement.
    tokens = {"loss_rollout": "num_rollout_tokens", "loss_expert": "num_expert_tokens"}.get(key, "")
    known = {
        record["step"]: value
        for record, value in zip(history.steps, history.column(key))
        if not math.isnan(value) and record.get(tokens) != 0
    }
    steps, values = sorted(known), [known[step] for step in sorted(known)]
    if len(steps) > FEW_STEPS and key != "mu":
        values = running_mean(values, reach=max(2, len(values) // 50))
    return steps, values


def over_runs(curves: Iterable[Curve], what: Callable[[list[float]], float]) -> Curve:
    """`what` of the runs' values at each step that one of them has."""
    values: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in zip(*curve):
            values.setdefault(step, []).append(value)
    return sorted(values), [what(values[step]) for step in sorted(values)]


def _draw(axis: Axes, *, groups: Sequence[Group], curves: Sequence[Sequence[Curve]]) -> None:
    for group, own in zip(groups, curves):
        if not own:
            continue
        color, dashes = group.line
        steps, means = over_runs(own, fmean)
        marker = "o" if len(steps) <= FEW_STEPS else ""
        axis.plot(steps, means, color=color, linestyle=dashes, marker=marker, markersize=3, linewidth=1.6)
        if len(own) > 1:
            axis.fill_between(
                steps, over_runs(own, min)[1], over_runs(own, max)[1], color=color, alpha=0.2, linewidth=0
            )


def _compared(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if key not in (SEED, *_PLACES)}
