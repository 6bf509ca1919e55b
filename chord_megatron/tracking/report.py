"""The report of a run: report.png and a self-contained report.html."""

from __future__ import annotations

from pathlib import Path

from chord_megatron.system.atomic import atomic_write
from chord_megatron.tracking.completions import Completions, read_completions
from chord_megatron.tracking.expert_rows import MOST_POINTS, expert_panels, most_moved, read_visits
from chord_megatron.tracking.findings import findings
from chord_megatron.tracking.pages import figure_of, render
from chord_megatron.tracking.plots import draw_history, run_panels
from chord_megatron.tracking.run_log import COMPLETIONS_FILE, EXPERTS_FILE
from chord_megatron.tracking.summary import History, load_history, summarize_history, summary_rows

NOTHING_TO_SAY = "No rule has anything to say."
SAMPLES_PER_STEP = 3  # completions of a step that a page without its script shows
_LONGEST_CONFIGURATION = 200_000  # characters


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write report.png and report.html into a run directory and return both paths, the PNG first.

    Raises UserError when the directory has no metrics, and where a log is damaged.
    """
    history = load_history(run_dir)
    page = _page(run_dir, history)
    png_path, html_path = run_dir / "report.png", run_dir / "report.html"
    atomic_write(png_path, [draw_history(history, run_dir.resolve().name)])
    atomic_write(html_path, [page])
    return png_path, html_path


def _page(run_dir: Path, history: History) -> bytes:
    completions = read_completions(run_dir / COMPLETIONS_FILE)
    visits = read_visits(run_dir / EXPERTS_FILE)
    return render(
        "report.html",
        script="browse.js",
        title=run_dir.resolve().name,
        summary=summary_rows(summarize_history(history)),
        said=findings(history.steps),
        nothing_to_say=NOTHING_TO_SAY,
        figures=[figure_of(panel) for panel in run_panels(history)],
        expert_figures=[figure_of(panel) for panel in expert_panels(visits)],
        expert_visits=len(visits),
        most_points=MOST_POINTS,
        moved=most_moved(visits),
        completions=completions,
        ends=completions.ends(SAMPLES_PER_STEP),
        data=_data(completions),
        configuration=_configuration(run_dir / "config.yaml"),
    )


def _data(completions: Completions) -> list[list[object]]:
    """What browse.js reads."""
    return [[row.step, row.is_eval, row.reward, row.facts, row.texts] for row in completions.rows]


def _configuration(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_LONGEST_CONFIGURATION)
