"""The reward of the problems here: the last number of a completion, or the word that was asked for."""

from __future__ import annotations

import re

NUMBER = re.compile(r"-?\d+")


def right_answer(prompts: list[str], completions: list[str], references: list[str], **_: object) -> list[float]:
    """1 where it is right, else 0."""
    return [float(is_right(text, reference)) for text, reference in zip(completions, references, strict=True)]


def is_right(completion: str, reference: str) -> bool:
    """A number has to be the last one; a word has to be there."""
    if NUMBER.fullmatch(reference):
        return (NUMBER.findall(completion) or [None])[-1] == reference
    return reference in completion
