"""The report of a run: report.png and a self-contained report.html."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from chord_megatron.system.atomic import atomic_write
from chord_megatron.system.files import read_json_lines
from chord_megatron.tracking.findings import findings
from chord_megatron.tracking.plots import draw_history
from chord_megatron.tracking.run_log import COMPLETIONS_FILE
from chord_megatron.tracking.summary import load_history, summarize_history, summary_rows

NOTHING_TO_SAY = "No rule has anything to say."
SAMPLES_PER_STEP = 3  # completions shown of the first and of the last logged step

CSS = """
:root { color-scheme: light dark;
  --ink: #1a202c; --muted: #5a6678; --paper: #fff; --card: #f4f6f9; --rule: #dbe1ea; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --muted: #9aa7b8; --paper: #14181f; --card: #1e242e; --rule: #333c4a; }
}
body { margin: 2rem auto; max-width: 78rem; padding: 0 1.25rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
img { width: 100%; height: auto; border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .3rem 1.5rem .3rem 0; border-bottom: 1px solid var(--rule); }
th { font-weight: normal; color: var(--muted); }
td { font-variant-numeric: tabular-nums; }
pre { margin: .4rem 0; padding: .7rem .9rem; background: var(--card); border-radius: 6px; max-height: 24rem;
  overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; }
article { border-left: 3px solid var(--rule); padding-left: 1rem; margin: 1rem 0; }
article p { margin: 0; color: var(--muted); font-size: .85rem; overflow-wrap: anywhere; }
summary { cursor: pointer; }
"""


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write report.png and report.html into a run directory and return both paths, the PNG first.

    Raises UserError when the directory has no metrics.
    """
    history = load_history(run_dir)
    name = run_dir.resolve().name
    image = draw_history(history, name)
    page = _page(run_dir, name, image, summary_rows(summarize_history(history)), findings(history.steps))
    png_path, html_path = run_dir / "report.png", run_dir / "report.html"
    atomic_write(png_path, [image])
    atomic_write(html_path, [page.encode("utf-8", errors="replace")])
    return png_path, html_path


def _page(run_dir: Path, name: str, image: bytes, rows: list[tuple[str, str]], said: list[str]) -> str:
    table = "\n".join(f"<tr><th>{escape(label)}</th><td>{escape(text)}</td></tr>" for label, text in rows)
    source = f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{escape(name)}</h1>
<table>
{table}
</table>
{_findings(said)}
<h2>Curves</h2>
<img src="{source}" alt="Training curves">
{_samples(run_dir / COMPLETIONS_FILE)}
{_configuration(run_dir / "config.yaml")}
</body>
</html>
"""


def _findings(said: list[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in said)
    return f"<h2>What the curves suggest</h2>\n<ul>{items or f'<li>{NOTHING_TO_SAY}</li>'}</ul>"


def _configuration(path: Path) -> str:
    if not path.exists():
        return ""
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<h2>Configuration</h2>\n<details><summary>config.yaml</summary><pre>{text}</pre></details>"


def _samples(path: Path) -> str:
    steps = _first_and_last_step(read_json_lines(path))
    if not steps:
        return ""
    sections = []
    for step, rows in steps.items():
        sections.append(f"<h3>Step {escape(str(step))}</h3>")
        sections += (_sample(row) for row in rows[:SAMPLES_PER_STEP])
    return "<h2>Sample completions</h2>\n" + "\n".join(sections)


def _first_and_last_step(rows: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The rows of the first and of the last step in the log, by step; one entry when they are the same."""
    kept: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["step"] not in kept and len(kept) == 2:
            kept.popitem()
        kept.setdefault(row["step"], []).append(row)
    return kept


def _sample(row: dict[str, Any]) -> str:
    """One completion: the texts as blocks, every other column in a line above them."""
    columns = {key: value for key, value in row.items() if key not in ("step", "prompt", "completion")}
    facts = " · ".join(f"{key}: {_short(value)}" for key, value in columns.items())
    blocks = "".join(
        f"<p>{key}</p><pre>{escape(str(row[key]))}</pre>" for key in ("prompt", "completion") if key in row
    )
    return f"<article><p>{escape(facts)}</p>{blocks}</article>"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
