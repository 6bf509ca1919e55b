"""Run the project's command, and scripts beside it, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from chord_megatron.system.errors import UserError

_running: set[subprocess.Popen[str]] = set()


def run_chord_megatron(*arguments: str | Path) -> str:
    """`chord-megatron ...`: what it printed. Raises UserError with its last line."""
    return run([sys.executable, "-m", "chord_megatron.cli", *arguments])


def run_script(*arguments: str | Path) -> str:
    """A Python script with its arguments."""
    return run([sys.executable, *arguments])


def run(command: Sequence[str | Path]) -> str:
    """On one thread, so that runs side by side have a core each; returns its standard output."""
    words = list(map(str, command))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        _running.add(process)
        try:
            output, errors = process.communicate()
        finally:
            _running.discard(process)
    if process.returncode:
        print(output, errors, sep="", file=sys.stderr)
        last = (errors.strip() or output.strip() or "without a word").splitlines()[-1]
        raise UserError(f"{' '.join(words)} ended with {process.returncode}: {last}")
    return output


def end_all() -> None:
    """Have those that are running end, as SIGTERM does it."""
    for process in [*_running]:
        process.terminate()
