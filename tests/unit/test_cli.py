"""What the command line says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from typer.testing import CliRunner

from chord_megatron.cli import app

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_the_version_is_that_of_the_package():
    version = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["version"]
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"chord_megatron {version}\n")


def test_a_shell_completes_commands_and_options():
    """As bash asks for it, after `chord-megatron --install-completion`."""

    def completed(line: str) -> list[str]:
        words = line.split(" ")
        asked = {"_CHORD_MEGATRON_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": f"{len(words) - 1}"}
        code = "import sys; sys.argv = ['chord-megatron']; from chord_megatron.cli import app; app()"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True).stdout.split()

    assert completed("chord-megatron va") == ["validate"]
    assert "--json" in completed("chord-megatron validate --j")
