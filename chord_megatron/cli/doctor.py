"""`chord-megatron doctor`: what this machine has, and whether a configuration runs on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from chord_megatron.cli.options import Nodes, Overrides, PrintJson, ProcessesPerNode, validated


def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]")] = None,
    overrides: Overrides = None,
    nproc_per_node: ProcessesPerNode = 1,
    nnodes: Nodes = 1,
    print_json: PrintJson = False,
) -> int:
    """Say what this machine has and what replaces the rest; exit code 1 where training, or CONFIG, cannot run."""
    from rich.console import Console

    from chord_megatron.doctor import examination
    from chord_megatron.doctor.report import as_json, as_table, problems
    from chord_megatron.weights.hf_config import read_architecture

    if config is None:
        checks = examination.examine()
    else:
        resolved, plan = validated(config, overrides, nproc_per_node * nnodes)
        arch = read_architecture(Path(resolved.model.path))
        checks = examination.examine_for(resolved, arch, plan, nproc_per_node)
    if print_json:
        print(as_json(checks))
    else:
        Console().print(as_table(checks))
        if not problems(checks):
            what = "training" if config is None else "this run\n(its data, rewards and servers were not checked)"
            print(f"\nnothing on this machine stands in the way of {what}")
    for problem in problems(checks):
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems(checks) else 0
