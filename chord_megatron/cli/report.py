"""`chord-megatron report`: the figures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chord_megatron.cli.options import PrintJson


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    print_json: PrintJson = False,
) -> int:
    """Write report.html and report.png of a run, finished or not."""
    from rich.console import Console

    from chord_megatron.system.files import json_text
    from chord_megatron.tracking.report import write_report
    from chord_megatron.tracking.summary import print_summary, summary_document

    paths = write_report(run_dir)
    if print_json:
        print(json_text({**summary_document(run_dir), "files": [str(path) for path in paths]}))
        return 0
    print_summary(run_dir, Console())
    print(*paths, sep="\n")
    return 0
