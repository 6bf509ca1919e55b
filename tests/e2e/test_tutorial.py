"""docs/tutorial.md to the letter: each line behind a `$` is run, in order, in an empty directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Each command, and what the page shows of its output."""
    found: list[tuple[str, str]] = []
    for block in BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")):
        for line in block.splitlines():
            found.append((line[2:], "")) if line.startswith("$ ") else found.append((found.pop()[0], line))
    return found


def test_every_command_of_the_tutorial(tmp_path: Path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    assert len(commands()) > 10
    for command, shown in commands():
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert shown in done.stdout, command
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert (tmp_path / "runs" / "mine" / "hf" / "step_30" / "model.safetensors").is_file()
