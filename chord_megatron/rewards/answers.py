r"""The final answer of a text: completions and references are read alike.

It is what the last mark holds: `\boxed{...}`, a `#### ...` line (GSM8K) or `<answer>...</answer>`. One pass and no
recursion: a completion may be anything, also ten thousand braces.
"""

from __future__ import annotations

import re

from chord_megatron.rewards.numbers import read_number

_MARK = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)"
    r"|\\(?:boxed|fbox)\s+(?P<bare>[-+]?[\d.,]*\d)"  # \boxed 5, as in a few solutions of MATH
    r"|(?P<tag><answer>)"
    # The rest of the line is looked at only: another mark may stand in it.
    r"|(?<!#)####(?!#)(?=(?P<line>(?:(?!####)[^\n])*+))"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ is no brace


def without_thoughts(text: str) -> str:
    """What follows `</think>`: what stands before is not the answer yet."""
    return text.rpartition("</think>")[2]


def final_answer(text: str) -> str | None:
    """What the mark that begins last holds: "" where it does not end; None where there is no mark."""
    end = len(text.rstrip("# \t\r\n"))
    for mark in reversed(list(_MARK.finditer(text))):
        if mark["line"] is None:
            return _held(text, mark).strip()
        line = mark["line"].strip()
        # "#### Step 1" is a heading: words are an answer in the last line only.
        if line and (mark.end("line") >= end or read_number(line) is not None):
            return line
    return None


def _held(text: str, mark: re.Match[str]) -> str:
    if mark["bare"]:
        return mark["bare"]
    if mark["tag"]:
        inner, end, _ = text[mark.end() :].partition("</answer>")
        return inner if end else ""
    depth = 1
    for brace in _BRACE.finditer(text, mark.end()):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[mark.end() : brace.start()]
    return ""
