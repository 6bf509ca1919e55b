"""The comparison of several runs: comparison.png and a self-contained comparison.html."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from chord_megatron.system.atomic import atomic_write, failed_writes_named
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.comparison import (
    SEED,
    Group,
    Run,
    as_text,
    comparison_panels,
    differences,
    group_runs,
)
from chord_megatron.tracking.drawing import draw_picture
from chord_megatron.tracking.pages import figure_of, render
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.tracking.summary import EvalPoint, Summary, load_history, summarize_history

BAND = "Runs that differ in train.seed alone are one curve: their mean, in a band from their lowest to their highest."
_COLUMNS: dict[str, tuple[str, Callable[[Summary], float | EvalPoint | None]]] = {
    "steps": (",.0f", lambda summary: summary.steps),
    "first eval": (".4f", lambda summary: summary.first_eval),
    "last eval": (".4f", lambda summary: summary.last_eval),
    "best eval": (".4f", lambda summary: summary.best_eval),
    "last reward": (".4f", lambda summary: summary.last_reward),
    "last loss": (".4f", lambda summary: summary.last_loss),
    "tokens/s": (",.0f", lambda summary: summary.tokens_per_second),
    "seconds in steps": (",.1f", lambda summary: summary.step_seconds),
}


@dataclass(frozen=True)
class Comparison:
    """Runs in their groups, with the keys that differ and the value of each group."""

    groups: list[Group]
    differing: list[tuple[str, list[str]]]

    def numbers(self) -> tuple[list[str], list[tuple[list[str], bool]]]:
        """A table: its columns, and rows of texts, each with whether it is the mean of the runs above it.

        A number that no run has is left out.
        """
        runs = [run for group in self.groups for run in group.runs]
        known = {name: kind for name, kind in _COLUMNS.items() if any(kind[1](run.summary) is not None for run in runs)}
        formats = [form for form, _ in known.values()]
        rows: list[tuple[list[str], bool]] = []
        for group in self.groups:
            values = [[value(run.summary) for _, value in known.values()] for run in group.runs]
            for run, own in zip(group.runs, values):
                rows.append(([run.name, as_text(run.settings.get(SEED, "")), *map(_text, own, formats)], False))
            if len(group.runs) > 1:
                means = map(_text, map(_mean, zip(*values)), formats)
                rows.append(([f"mean of {len(group.runs)}", "", *means], True))
        return ["run", "seed", *known], rows

    def document(self) -> dict[str, Any]:
        """The same as JSON."""
        return {
            "groups": [
                {
                    "name": group.name,
                    "runs": [
                        {"name": run.name, "seed": run.settings.get(SEED), **asdict(run.summary)} for run in group.runs
                    ],
                }
                for group in self.groups
            ],
            "differences": {
                key: {group.name: text for group, text in zip(self.groups, texts)} for key, texts in self.differing
            },
        }


def load_comparison(run_dirs: Sequence[Path]) -> Comparison:
    """Read what the runs have logged. Raises UserError, also where a run is named twice, or only one is."""
    if len(run_dirs) < 2:
        raise UserError("name two runs or more; of one run `chord-megatron report` writes the curves")
    places = [path.resolve() for path in run_dirs]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place} is named twice; name each run once")
    names = _names(places)
    runs = []
    for path, name in zip(run_dirs, names):
        history = load_history(path)
        runs.append(Run(name, RunDir(path).settings(), history, summarize_history(history)))
    groups = group_runs(runs)
    return Comparison(groups, differences(groups))


def write_comparison(comparison: Comparison, directory: Path) -> tuple[Path, Path]:
    """Write comparison.png and comparison.html into a directory, which is made; returns both paths.

    Raises UserError where it cannot be written.
    """
    groups = comparison.groups
    panels = comparison_panels(groups)
    has_band = any(len(group.runs) > 1 for group in groups)
    columns, rows = comparison.numbers()
    page = render(
        "comparison.html",
        title=f"{sum(len(group.runs) for group in groups)} runs",
        groups=groups,
        band=BAND if has_band else "",
        figures=[figure_of(panel) for panel in panels],
        columns=columns,
        rows=rows,
        differing=comparison.differing,
        unknown=[run.name for group in groups for run in group.runs if not run.settings],
    )
    legend = [(group.name, *group.line) for group in groups]
    picture = draw_picture(panels, "", BAND if has_band else "", legend)
    with failed_writes_named(directory):
        directory.mkdir(parents=True, exist_ok=True)
    png_path, html_path = directory / "comparison.png", directory / "comparison.html"
    atomic_write(png_path, [picture])
    atomic_write(html_path, [page])
    return png_path, html_path


def _names(places: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of those above them as it takes to tell them apart."""
    parts = 1
    while len({place.parts[-parts:] for place in places}) < len(places):
        parts += 1
    return ["/".join(place.parts[-parts:]) for place in places]


def _mean(values: Sequence[float | EvalPoint | None]) -> float | None:
    numbers = [value.reward if isinstance(value, EvalPoint) else value for value in values]
    known = [number for number in numbers if number is not None]
    return fmean(known) if known else None


def _text(value: float | EvalPoint | None, form: str) -> str:
    if value is None:
        return ""
    return f"{value.reward:{form}} (step {value.step})" if isinstance(value, EvalPoint) else f"{value:{form}}"
