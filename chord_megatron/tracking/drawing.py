"""Figures: a panel alone, light and dark, as SVG; several in one picture, as PNG. Pure: the bytes of files come out."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = (4.4, 3.1)
PICTURE_DPI = 110
COLUMNS = 3  # of the picture


@dataclass(frozen=True)
class Theme:
    """Colours on one background; `cycle` are those of the curves, by place."""

    paper: str
    ink: str
    muted: str
    grid: str
    cycle: tuple[str, ...]

    @property
    def colors(self) -> tuple[str, ...]:
        """All of them."""
        return (self.paper, self.ink, self.muted, self.grid, *self.cycle)


LIGHT = Theme(
    "#ffffff",
    "#1a202c",
    "#718096",
    "#e2e8f0",
    ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#c53030", "#d69e2e", "#1a202c", "#cbd5e0"),
)
DARK = Theme(
    "#14181f",
    "#e6eaf0",
    "#9aa7b8",
    "#2b3340",
    ("#63b3ed", "#f6ad55", "#68d391", "#b794f4", "#fc8181", "#f6e05e", "#e6eaf0", "#4a5568"),
)
# Matplotlib's names for places in the cycle of whatever theme a figure is drawn in.
BLUE, ORANGE, GREEN, PURPLE, RED, GOLD, INK, GREY = (f"C{place}" for place in range(len(LIGHT.cycle)))
NUM_HUES = 6  # of them; then ink and grey


@dataclass(frozen=True)
class Panel:
    """One question: its title, and what draws the answer."""

    title: str
    draw: Callable[[Axes], None]
    xlabel: str = "step"


def style(theme: Theme) -> dict[Any, Any]:
    """Matplotlib's settings, under which a figure is built and rendered."""
    from cycler import cycler

    return {
        "axes.axisbelow": True,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": theme.paper,
        "axes.labelcolor": theme.ink,
        "axes.prop_cycle": cycler(color=theme.cycle),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": theme.ink,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "figure.facecolor": theme.paper,
        "font.size": 9,
        "grid.color": theme.grid,
        "legend.borderaxespad": 0.2,
        "legend.borderpad": 0,
        "legend.columnspacing": 0.8,
        "legend.fontsize": 7.5,
        "legend.frameon": False,
        "legend.handlelength": 1.0,
        "legend.handletextpad": 0.4,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
    }


def draw_panel(panel: Panel) -> tuple[bytes, bytes]:
    """A panel alone as SVG, light and dark: drawn once, and coloured anew."""
    import matplotlib as mpl  # half a second that only the report pays

    buffer = io.BytesIO()
    with mpl.rc_context({**style(LIGHT), "svg.hashsalt": panel.title}):
        panel_figure(panel).savefig(buffer, format="svg", metadata={"Date": None})
    light = buffer.getvalue()
    dark_of = {before.encode(): after.encode() for before, after in zip(LIGHT.colors, DARK.colors, strict=True)}
    return light, re.sub(b"#[0-9a-f]{6}", lambda color: dark_of.get(color[0], color[0]), light)


def draw_picture(panels: Sequence[Panel], title: str, below: str, legend: Sequence[tuple[str, str, str]] = ()) -> bytes:
    """All panels in one PNG, with lines of text below them, and a legend of (label, colour, line style)."""
    import matplotlib as mpl

    with mpl.rc_context(style(LIGHT)):
        return _png(picture_figure(panels, title, below, legend), PICTURE_DPI)


def panel_figure(panel: Panel) -> Figure:
    """The figure of one panel; within the settings of `style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL_INCHES, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    _fill(figure.subplots(), panel)
    return figure


def picture_figure(panels: Sequence[Panel], title: str, below: str, legend: Sequence[tuple[str, str, str]]) -> Figure:
    """The figure of all panels; within the settings of `style`."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = max(1, -(-len(panels) // COLUMNS))
    figure = Figure(figsize=(COLUMNS * 5, rows * 3.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)  # a name may hold a $
    places = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axis, panel in zip(places, panels):
        _fill(axis, panel)
    for axis in places[len(panels) :]:
        axis.set_axis_off()
    if below:
        figure.supxlabel(below, x=0.01, ha="left", fontsize=10, parse_math=False)
    if legend:
        lines = [Line2D([], [], color=color, ls=dashes, label="a run") for _, color, dashes in legend]
        texts = figure.legend(handles=lines, loc="outside upper left", ncols=4, fontsize=9).get_texts()
        for text, (label, _, _) in zip(texts, legend):  # afterwards: a label that begins with _ would be left out
            text.set(text=label, parse_math=False)
    return figure


def right_axis(axis: Axes, label: str, color: str) -> Axes:
    """A second scale, on the right, in the colour of its curve."""
    right = axis.twinx()
    right.set_ylabel(label, color=color)
    right.tick_params(axis="y", colors=color)
    right.spines["right"].set(visible=True, color=color)
    return right


def _fill(axis: Axes, panel: Panel) -> None:
    """Draw a panel: then grid, step axis, the title, and below it the legend in a line of its own."""
    from matplotlib.ticker import MaxNLocator

    panel.draw(axis)
    right = [other for other in axis.get_shared_x_axes().get_siblings(axis) if other is not axis]
    handles = [handle for each in (axis, *right) for handle in each.get_legend_handles_labels()[0]]
    axis.grid(True)
    axis.set_xlabel(panel.xlabel)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    has_legend = len(handles) > 1
    axis.set_title(panel.title, pad=18 if has_legend else 6)
    if has_legend:
        axis.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles))


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
