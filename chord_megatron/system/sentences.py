"""Sentences: what others wrote, on one line and no longer than one reads; plurals; lines that fit a terminal."""

from __future__ import annotations

import contextlib
import difflib
import os
import reprlib
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

_LONGEST = 300  # characters of a library's message
# Of lists and groups the first items alone: values of YAML's aliases of aliases have no end.
_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlevel = 80, 80, 2


def shown(value: Any) -> str:
    """A value as Python writes it, without its middle where it is long."""
    return _SHORT.repr(value)


def one_line(error: object) -> str:
    """The text of an error, or of somebody's answer; the error's type where it says nothing."""
    return " ".join(str(error).split())[:_LONGEST] or type(error).__name__


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a sentence that refuses a name: the nearest of the known ones; "" where none is near."""
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def size(nbytes: float) -> str:
    """Bytes in units of 10^9, or of 10^6 where they are few."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 10**8 else f"{nbytes / 1e6:.1f} MB"


def counted(number: float, noun: str, plural: str = "") -> str:
    """`1 process`, `2 processes`, `0.5 epochs`: `plural` where it is not the noun with an s."""
    said = f"{number:g}" if isinstance(number, float) else number
    return f"{said} {noun if number == 1 else plural or f'{noun}s'}"


def looked_for(path: Path) -> str:
    """The end of "... is not there": where a relative path led to."""
    return "" if path.is_absolute() else f" (looked for at {path.absolute()})"


def fitted(text: str, width: int) -> str:
    """The text in lines of at most `width` characters, broken between words alone: paths stay whole."""
    wrapped = (
        textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""] for line in text.split("\n")
    )
    return "\n".join(line for lines in wrapped for line in lines)


def say(text: str, stream: TextIO) -> None:
    """Print a sentence: whole into files and pipes, on a terminal without breaking words."""
    if stream.isatty():
        with contextlib.suppress(OSError):  # no terminal after all
            text = fitted(text, os.get_terminal_size(stream.fileno()).columns or 80)
    print(text, file=stream, flush=True)
