"""References that look as if a part of them were missing."""

from __future__ import annotations

import re

from chord_megatron.rewards.answers import final_answer

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ is no brace
_GOES_ON = re.compile(r"[.,:/]?\w")


def cut_short(reference: str, text: str, pattern: str | None) -> tuple[str, str] | None:
    """Why a reference seems to be cut, and what shows it; None where it does not.

    text: the column that it was taken of, by data.reference_pattern (None: it is all of it).
    """
    if final_answer(reference) == "":
        return "its mark of the final answer does not end", reference
    if _open_braces(reference):
        return "a brace in it does not close", reference
    if reference.endswith(("...", "…")):
        return "it ends in an ellipsis", reference
    match = re.search(pattern, text) if pattern is not None else None
    if match and _is_within_a_word(text, *match.span(1)):
        return "data.reference_pattern takes a part of a number or word", _around(text, *match.span(1))
    return None


def _open_braces(text: str) -> int:
    depth = 0
    for brace in _BRACE.findall(text):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:  # another end of something that began before it
            return depth
    return depth


def _is_within_a_word(text: str, start: int, end: int) -> bool:
    """Whether a number or a word goes on where what was taken of it ends, or began before."""
    taken = text[start:end]
    goes_on = taken[-1:].isalnum() and _GOES_ON.match(text, end)
    return bool(goes_on) or (
        taken[:1].isdigit() and bool(re.search(r"(\w|\d[.,]|(?<![\w\s])-|^-|\s-)\Z", text[:start]))
    )


def _around(text: str, start: int, end: int) -> str:
    before, behind = text[:start].split(" ")[-1], text[end:].split(" ")[0]
    return (before + text[start:end] + behind)[:80]
