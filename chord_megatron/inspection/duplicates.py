"""Questions that are asked twice: within a data set, and in held-out prompts and what is trained on."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from chord_megatron.data.conversations import Conversation

_MOST_EXAMPLES = 3


class Question(NamedTuple):
    """What tells a question from others; the texts of a large file would not fit in memory."""

    row: int
    exact: bytes
    normalised: bytes  # without case, and with single spaces for white space


@dataclass(frozen=True)
class Repeated:
    """A question in two places: row numbers of two data sets, or of one."""

    row: int
    other_row: int
    exact: bool


@dataclass(frozen=True)
class Duplicates:
    """Rows of `data_set` whose question comes in `other`, too, or comes earlier where that is the same data set."""

    data_set: str
    other: str
    of: int  # rows of `data_set` that were compared
    exact: int
    normalised: int  # beside the exact ones: equal but for case and white space
    examples: tuple[Repeated, ...]

    @property
    def count(self) -> int:
        return self.exact + self.normalised


def question_of(row: int, conversation: Conversation) -> Question:
    """Of all that is asked: text and messages alike, without the system message, which a run may choose."""
    text = question_text(conversation)
    plain = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return Question(row, _digest(text), _digest(plain))


def question_text(conversation: Conversation) -> str:
    """Its messages but the system's; the role of each where they are several."""
    question = conversation.question
    if isinstance(question, str):
        return question
    said = [(message["role"], str(message.get("content") or "")) for message in question if message["role"] != "system"]
    if [role for role, _ in said] == ["user"]:
        return said[0][1]
    return "\n".join(f"{role}: {content}" for role, content in said)


def find_duplicates(data_set: str, questions: Sequence[Question], other: str, others: Sequence[Question]) -> Duplicates:
    """Of `questions` in `others`."""
    exact = {question.exact: question.row for question in reversed(others)}  # the first one stays
    normalised = {question.normalised: question.row for question in reversed(others)}
    repeated = (_repeated(question, exact, normalised) for question in questions)
    return _summary(data_set, other, len(questions), [each for each in repeated if each])


def find_repeats(data_set: str, questions: Sequence[Question]) -> Duplicates:
    """Of questions earlier in the same data set."""
    exact: dict[bytes, int] = {}
    normalised: dict[bytes, int] = {}
    found = []
    for question in questions:
        if repeated := _repeated(question, exact, normalised):
            found.append(repeated)
        exact.setdefault(question.exact, question.row)
        normalised.setdefault(question.normalised, question.row)
    return _summary(data_set, data_set, len(questions), found)


def _repeated(question: Question, exact: Mapping[bytes, int], normalised: Mapping[bytes, int]) -> Repeated | None:
    """A question that is among others, whose rows these are."""
    if question.exact in exact:
        return Repeated(question.row, exact[question.exact], True)
    if question.normalised in normalised:
        return Repeated(question.row, normalised[question.normalised], False)
    return None


def _summary(data_set: str, other: str, of: int, found: list[Repeated]) -> Duplicates:
    exact = sum(repeated.exact for repeated in found)
    return Duplicates(data_set, other, of, exact, len(found) - exact, tuple(found[:_MOST_EXAMPLES]))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()
