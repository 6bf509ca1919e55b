r"""The final answer of a text: completions and references are read alike.

It is what the last mark holds: `\boxed{...}`, a `#### ...` line (GSM8K) or `<answer>...</answer>`. One pass and no
recursion: a completion may be anything, also ten thousand braces.
"""

from __future__ import annotations

import re
from typing import Literal

from chord_megatron.rewards.numbers import read_number

AnswerFormat = Literal["boxed", "hash", "tag", "any"]  # which marks count

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


def final_answer(text: str, answer_format: AnswerFormat = "any") -> str | None:
    """What the mark that begins last holds: "" where it does not end; None where there is no mark of that format.

    A mark of one format may hold one of another, as in `#### \\boxed{18}`.
    """
    if answer_format != "any":
        held = _last_held(text, answer_format)
        within = None if held is None else _last_held(held, "any")
        return held if within is None else within
    return _last_held(text, "any")


def _last_held(text: str, answer_format: AnswerFormat) -> str | None:
    end = len(text.rstrip("# \t\r\n"))
    for mark in reversed(list(_MARK.finditer(text))):
        if answer_format not in ("any", _format_of(mark)):
            continue
        if mark["line"] is None:
            return _held(text, mark).strip()
        line = mark["line"].strip()
        # "#### Step 1" is a heading: words are an answer in the last line only.
        if line and (mark.end("line") >= end or read_number(line) is not None):
            return line
    return None


def _format_of(mark: re.Match[str]) -> AnswerFormat:
    if mark["line"] is not None:
        return "hash"
    return "tag" if mark["tag"] else "boxed"


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
