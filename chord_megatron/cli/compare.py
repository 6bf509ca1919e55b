"""`chord-megatron compare`: the curves, numbers and configurations of several runs beside one another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chord_megatron.cli.options import PrintJson


def compare(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="where the two files go")] = Path(),
    print_json: PrintJson = False,
) -> int:
    """Write comparison.html and comparison.png of several runs, finished or not.

    Runs that differ in train.seed alone are one curve: their mean, in a band from the lowest to the highest.
    """
    from rich.console import Console

    from chord_megatron.system.files import json_text
    from chord_megatron.system.wide_tables import WideTable
    from chord_megatron.tracking.comparison_report import load_comparison, write_comparison

    comparison = load_comparison(run_dirs)
    paths = write_comparison(comparison, output)
    if print_json:
        print(json_text({**comparison.document(), "files": [str(path) for path in paths]}))
        return 0
    columns, rows = comparison.numbers()
    console = Console()
    console.print(WideTable(columns, [texts for texts, _ in rows]))
    if comparison.differing:
        names = ["key", *(group.name for group in comparison.groups)]
        console.print(WideTable(names, [[key, *texts] for key, texts in comparison.differing]))
    print(*paths, sep="\n")
    return 0
