"""What others wrote, in a sentence: on one line, and no longer than one reads."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from typing import Any

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
