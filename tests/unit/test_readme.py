"""What README.md says of the Makefile and of files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE))))
def test_targets_are_there(target: str):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_figures_are_there():
    figures = re.findall(r"!\[.+?\]\((.+?)\)", README)
    assert figures and all((ROOT / figure).read_bytes().startswith(b"\x89PNG") for figure in figures)
