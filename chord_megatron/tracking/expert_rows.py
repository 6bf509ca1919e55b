"""The expert rows of a run: their log-probs over the steps, and which of them moved most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from chord_megatron.system.errors import UserError
from chord_megatron.system.files import read_json_lines
from chord_megatron.tracking.drawing import INK, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

MOST_POINTS = 4_000  # in a figure; every k-th visit beyond
MOST_MOVED = 10
_LARGEST = 1e300
_WIDTH, _HEIGHT, _MARGIN = 200, 44, 5  # of a small figure, in pixels


class Visit(NamedTuple):
    """An expert row at a step that trained on it; NaN where the log has no number."""

    step: int
    id: int
    log_prob: float
    phi: float
    shift: float


@dataclass(frozen=True)
class MovedRow:
    """An expert row that was trained on several times. `line` and `points` are places in a small figure, in pixels."""

    id: int
    visits: int
    first: float  # log-prob
    last: float
    phi: float  # at the last visit
    line: str
    start: float  # the height of the first log-prob
    points: tuple[tuple[float, float, str], ...]  # x, y, colour by phi


def read_visits(path: Path) -> list[Visit]:
    """Read experts.jsonl, in order; none where it is missing. Raises UserError naming the line."""
    return list(_visits(path))


def expert_panels(visits: Sequence[Visit]) -> list[Panel]:
    """Log-prob and shift of the rows over the steps, coloured by phi; none without a row."""
    known = [v for v in visits if not math.isnan(v.log_prob + v.shift + v.phi)]
    shown = known[:: max(1, -(-len(known) // MOST_POINTS))]
    if not shown:
        return []
    return [
        Panel("Expert rows", partial(_scatter, visits=shown, field="log_prob", label="mean log-prob of the answer")),
        Panel("Expert rows: log-prob lost", partial(_scatter, visits=shown, field="shift", label="since first seen")),
    ]


def most_moved(visits: Sequence[Visit]) -> list[MovedRow]:
    """The rows whose log-prob differs most from that of their first visit, the largest difference first."""
    by_row: dict[int, list[Visit]] = {}
    for visit in visits:
        if not math.isnan(visit.log_prob):
            by_row.setdefault(visit.id, []).append(visit)
    several = [row for row in by_row.values() if len(row) > 1]
    several.sort(key=lambda row: (-abs(row[-1].log_prob - row[0].log_prob), row[0].id))
    most_phi = max((v.phi for v in visits if not math.isnan(v.phi)), default=0.0)
    return [_moved(row, most_phi) for row in several[:MOST_MOVED]]


def _visits(path: Path) -> Iterator[Visit]:
    for number, row in enumerate(read_json_lines(path), start=1):
        values = [row.get(name) for name in ("log_prob", "phi", "shift")]
        if type(row.get("id")) is not int or not all(_is_number_or_none(value) for value in values):
            raise UserError(
                f"line {number} of {path} is no expert row (id, log_prob, phi, shift, all numbers); remove that line"
            )
        log_prob, phi, shift = (math.nan if value is None else float(value) for value in values)
        yield Visit(row["step"], row["id"], log_prob, phi, shift)


def _is_number_or_none(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < _LARGEST)


def _scatter(axis: Axes, *, visits: Sequence[Visit], field: str, label: str) -> None:
    steps, values, phis = zip(*((v.step, getattr(v, field), v.phi) for v in visits))
    points = axis.scatter(steps, values, c=phis, cmap=_colors(), s=7, linewidths=0)
    axis.set_ylabel(f"{label} (nats)")
    if field == "shift":
        axis.axhline(0, color=INK, linewidth=0.8)
    axis.get_figure().colorbar(points, ax=axis, label="phi, summed over the answer")  # type: ignore[union-attr]


@cache
def _colors() -> Colormap:
    """From little phi to much: the part of plasma that is seen on white and on black."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    plasma = colormaps["plasma"]
    return ListedColormap([plasma(0.3 + 0.55 * place / 255) for place in range(256)])


def _moved(row: Sequence[Visit], most_phi: float) -> MovedRow:
    from matplotlib.colors import to_hex

    thinned = [*row[: -1 : max(1, len(row) // 40)], row[-1]]
    xs = _spread([v.step for v in thinned], _WIDTH)
    ys = [_HEIGHT - y for y in _spread([v.log_prob for v in thinned], _HEIGHT)]
    shades = (0.0 if math.isnan(v.phi) or most_phi <= 0 else v.phi / most_phi for v in thinned)
    colors = [to_hex(_colors()(shade)) for shade in shades]
    return MovedRow(
        id=row[0].id,
        visits=len(row),
        first=row[0].log_prob,
        last=row[-1].log_prob,
        phi=row[-1].phi,
        line=" ".join(f"{x},{y}" for x, y in zip(xs, ys)),
        start=ys[0],
        points=tuple(zip(xs, ys, colors)),
    )


def _spread(values: Sequence[float], size: int) -> list[float]:
    """The values' places between the margins of a side, from the lowest to the highest."""
    low, high = min(values), max(values)
    span = high - low or 1.0
    return [round(_MARGIN + (size - 2 * _MARGIN) * ((value - low) / span), 1) for value in values]
