"""`chord-megatron report`: the figures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")]) -> int:
    """Write report.html and report.png of a run, finished or not."""
    from rich.console import Console

    from chord_megatron.tracking.report import write_report
    from chord_megatron.tracking.summary import print_summary

    paths = write_report(run_dir)
    print_summary(run_dir, Console())
    print(*paths, sep="\n")
    return 0
