"""What the command line says of itself."""

from __future__ import annotations

import tomllib
from pathlib import Path

from typer.testing import CliRunner

from chord_megatron.cli import app

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_the_version_is_that_of_the_package():
    version = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["version"]
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"chord_megatron {version}\n")
