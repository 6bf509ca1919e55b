"""The session in docs/look-at-your-data.md, to the letter."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chord_megatron.cli import app
from tests.unit.chat_templates import QWEN25, tokenizer_of

PAGE = Path(__file__).parents[2] / "docs" / "look-at-your-data.md"
CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def session() -> list[tuple[str, str]]:
    """Its commands, and what the page says that they print."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return re.findall(r"\$ (.*)\n((?:(?!\$ ).*\n)*)", "".join(blocks))


def test_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that is not there yet is written from the page."""
    (tmp_path / "model").mkdir()
    shutil.copy(CONFIGS / "Qwen2.5-7B" / "config.json", tmp_path / "model")
    tokenizer_of(QWEN25).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    names = []
    for command, said in session():
        program, *arguments = command.split()
        names.append(program)
        if program == "chord-megatron":
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
            assert "".join(f"{line.rstrip()}\n" for line in result.stdout.splitlines()) == said
        elif Path(arguments[0]).exists():
            assert Path(arguments[0]).read_text(encoding="utf-8") == said
        else:
            Path(arguments[0]).write_text(said, encoding="utf-8")
    assert names == ["cat", "cat", "cat", "chord-megatron", "cat", "chord-megatron"]
