"""Sentences that fit a terminal, and count rightly."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from chord_megatron.system.sentences import counted, fitted, looked_for, say


def test_nouns_are_counted():
    assert [counted(number, "process", "processes") for number in (0, 1, 2)] == [
        "0 processes",
        "1 process",
        "2 processes",
    ]
    assert counted(1, "packed sequence") == "1 packed sequence" and counted(3, "step") == "3 steps"


def test_lines_break_between_words_alone():
    path = "/a-path/that-is/longer-than/ten"
    assert fitted(f"one two three\n\nsee {path} four-five", 10) == f"one two\nthree\n\nsee\n{path}\nfour-five"


def test_a_sentence_is_whole_in_a_file_and_fits_a_terminal():
    text, stream = "word " * 30 + "end", io.StringIO()
    say(text, stream)
    assert stream.getvalue() == f"{text}\n"
    ours, theirs = os.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal:
        say(text, terminal)
        lines = os.read(ours, 4096).decode().splitlines()
    os.close(ours)
    assert " ".join(lines) == text and len(lines) > 1 and max(map(len, lines)) <= 80


def test_a_relative_path_says_where_it_led_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert looked_for(Path("runs/x")) == f" (looked for at {tmp_path}/runs/x)"
    assert looked_for(tmp_path) == ""
