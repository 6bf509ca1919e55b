"""The checks as a table, as JSON, and the problems as lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from chord_megatron import __version__
from chord_megatron.doctor.check import Check
from chord_megatron.system.files import json_text

_STYLES = {"ok": "green", "replaced": "yellow", "missing": "yellow", "wrong": "red"}


def problems(checks: Sequence[Check]) -> list[str]:
    """A line, with the remedy, for each thing that training fails by."""
    return [check.problem for check in checks if check.is_blocking]


def as_json(checks: Sequence[Check]) -> str:
    document = {
        "chord_megatron": __version__,
        "can_run": not problems(checks),
        "problems": problems(checks),
        "checks": [asdict(check) for check in checks],
    }
    return json_text(document)


def as_table(checks: Sequence[Check]) -> Table:
    # Without lines, for narrow terminals; long paths go on below rather than end in dots.
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold", max_width=16)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for check in checks:
        # Text: messages of others may hold square brackets, which are markup elsewhere.
        meaning = Text(check.meaning)
        if check.remedy:
            meaning.append(f"\n{check.remedy}", style="bold")
        table.add_row(Text(check.name), Text(check.found or "-"), Text(check.status, _STYLES[check.status]), meaning)
    return table
