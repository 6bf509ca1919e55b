"""Tokens as text that can be shown: which message wrote them, which are special, what they weigh in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

_MOST_TOKENS = 4000  # of a row; of a longer one as many of its beginning and of its end are shown
_BYTES_PER_CHARACTER = 4  # of UTF-8, at most: so many tokens may share a character


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens that are alike; without tokens a remark."""

    text: str
    tokens: tuple[int, ...]
    weight: float  # in the loss, beside phi and the like; 0: read, not learnt
    special: bool  # tokens of the tokenizer's own, such as <|im_end|>
    role: str | None  # of the message; None: the template


def make_spans(
    tokens: Sequence[int],
    weights: Sequence[float],
    prompt_length: int,
    tokenizer: Any,
    *,
    messages: Sequence[tuple[str, str]],
    prefill: str = "",
) -> tuple[Span, ...]:
    """The spans of a row: their tokens, one after the other, are `tokens`.

    weights: of each token. messages: role and content of those before the model's turn, which `prefill` begins.
    """
    half = _MOST_TOKENS // 2
    if len(tokens) > _MOST_TOKENS:
        head = make_spans(tokens[:half], weights[:half], prompt_length, tokenizer, messages=messages)
        start = len(tokens) - half
        tail = make_spans(tokens[start:], weights[start:], max(0, prompt_length - start), tokenizer, messages=[])
        return (*head, Span(f"… {start - half} tokens are not shown …", (), 0.0, False, None), *tail)
    pieces = [*_pieces(tokens, weights, prompt_length, tokenizer)]
    begins_at = sum(len(piece.text) for place, piece in pieces if place < prompt_length)
    text = "".join(piece.text for _, piece in pieces)
    roles = [*_roles_of_prompt(text[:begins_at], messages, prefill), *["assistant"] * (len(text) - begins_at)]
    with_roles, at = [], 0
    for _, piece in pieces:
        role = roles[at] if at < len(roles) else None
        with_roles.append(Span(piece.text, piece.tokens, piece.weight, piece.special, role))
        at += len(piece.text)
    return tuple(map(_join, _alike(with_roles)))


def _pieces(
    tokens: Sequence[int], weights: Sequence[float], prompt_length: int, tokenizer: Any
) -> Iterator[tuple[int, Span]]:
    """The fewest tokens that are whole characters, with the place of the first. Decoded behind those before them.

    By themselves, SentencePiece's decoders would drop the space that a text begins with.
    """
    markers = set(tokenizer.added_tokens_decoder)
    before: list[int] = []
    start = 0
    for end in range(1, len(tokens) + 1):
        here = list(tokens[start:end])
        text = _behind(before, here, tokenizer)
        is_special = here[0] in markers
        is_at_seam = end == len(tokens) or end == prompt_length or weights[end] != weights[start]
        is_whole = is_special or is_at_seam or tokens[end] in markers or len(here) == _BYTES_PER_CHARACTER
        if is_whole or not text.endswith("\ufffd"):
            yield start, Span(text, tuple(here), weights[start], is_special, None)
            before, start = here, end


def _behind(before: list[int], here: list[int], tokenizer: Any) -> str:
    whole, first = _decode([*before, *here], tokenizer), _decode(before, tokenizer)
    return whole[len(first) :] if whole.startswith(first) else _decode(here, tokenizer)


def _decode(tokens: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _roles_of_prompt(text: str, messages: Sequence[tuple[str, str]], prefill: str) -> list[str | None]:
    """The role of each character. Contents are looked for from the end, where headers of templates are fewer."""
    roles: list[str | None] = [None] * len(text)
    end = len(text)
    if prefill and text.endswith(prefill):
        end -= len(prefill)
        roles[end:] = ["assistant"] * len(prefill)
    for role, content in reversed(messages):
        content = content.strip()
        place = text.rfind(content, 0, end) if content else -1
        if place >= 0:  # templates may leave contents out, or write them otherwise
            roles[place : place + len(content)] = [role] * len(content)
            end = place
    return roles


def _alike(spans: list[Span]) -> Iterator[list[Span]]:
    for _, group in groupby(spans, key=lambda span: (span.weight, span.special, span.role)):
        yield [*group]


def _join(spans: list[Span]) -> Span:
    first = spans[0]
    text, tokens = "".join(span.text for span in spans), tuple(token for span in spans for token in span.tokens)
    return Span(text, tokens, first.weight, first.special, first.role)
