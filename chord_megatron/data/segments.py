"""Answers in parts that weigh differently: from the data's `[[text, weight], ...]` to a weight for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from chord_megatron.data.bad_rows import BadRow
from chord_megatron.data.columns import read_weight
from chord_megatron.data.turns import UNREAD, Answer, Turn
from chord_megatron.system.sentences import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORM = "parts of an answer are [text, weight] or {'text': ..., 'weight': ...}"


@dataclass(frozen=True)
class Segment:
    """A part of an answer."""

    text: str
    weight: float  # 0: not learnt


def read_segments(value: Any, column: str) -> list[Segment] | None:
    """The parts of an answer; None where it is not a list of such. Raises BadRow."""
    if not isinstance(value, list) or not value or not all(isinstance(part, (list, Mapping)) for part in value):
        return None
    return [_read_segment(part, index, column) for index, part in enumerate(value)]


def _read_segment(part: Any, index: int, column: str) -> Segment:
    if isinstance(part, Mapping):
        text, weight, is_pair = part.get("text"), part.get("weight"), set(part) == {"text", "weight"}
    else:
        is_pair = len(part) == 2
        text, weight = part if is_pair else (None, None)
    if not is_pair or not isinstance(text, str):
        raise BadRow(f"column {column!r}: {_FORM}", f", but part {index} is {shown(part)}")
    return Segment(text, read_weight(weight, f"column {column!r}: a part's weight"))


class TokenWeights:
    """Finds which token belongs to which part."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._places: Tokenizer | None = None

    def of(self, segments: list[Segment], answer: Answer, turn: Turn) -> tuple[float, ...]:
        """The weight of each token of the answer: that of the part which the token's first character is in.

        What the template writes before the answer weighs as its first part, what ends it as its last. Raises BadRow.
        """
        content = [(character, segment.weight) for segment in segments for character in segment.text]
        first, last = segments[0].weight, segments[-1].weight
        characters = _of_characters(
            content[: len(answer.content)], answer.text.removesuffix(turn.ending), first=first, last=last
        )
        characters += [last] * len(turn.ending)
        weights = (*(characters[start] for start in self._starts(answer, turn)), last)
        if not any(weights):
            raise BadRow("every part of the answer has the weight 0", "; leave such rows out")
        return weights

    def _starts(self, answer: Answer, turn: Turn) -> list[int]:
        """Where in the answer's text its tokens but the last, which ends it, begin."""
        if self._places is None:
            if not self._tokenizer.is_fast:
                raise BadRow("answers in parts need a tokenizer that says where its tokens are (tokenizer.json)")
            self._places = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
            self._places.post_processor = None  # which may take the spaces off the places
        wanted = list(answer.tokens[:-1])
        is_read = UNREAD not in turn.tokens[:1]
        for before in (turn.text, "") if is_read else ("",):  # as `Turns.answer`: behind the prompt, or else by itself
            encoded = self._places.encode(before + answer.text, add_special_tokens=False)
            starts = [start - len(before) for start, _ in encoded.offsets]
            first = next((i for i, start in enumerate(starts) if start >= 0), 0)
            if encoded.ids[first : first + len(wanted)] == wanted:
                return starts[first : first + len(wanted)]
        raise BadRow("the tokenizer does not say which tokens belong to which part of the answer")


def _of_characters(content: list[tuple[str, float]], text: str, *, first: float, last: float) -> list[float]:
    """The weight of each character of what a template made of an answer: it may add before it, and change white space.

    Both are walked from the end. Raises BadRow where anything else differs.
    """
    weights = [first] * len(text)
    place = len(text)
    while place and content:
        character, weight = content[-1]
        if character == text[place - 1]:
            place -= 1
            weights[place] = last = weight
            content.pop()
        elif text[place - 1].isspace():
            place -= 1
            weights[place] = last
        elif character.isspace():
            content.pop()
        else:
            raise BadRow("the chat template changes an answer in parts, so that they cannot be found in it")
    return weights
