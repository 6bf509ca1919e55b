"""Rows -> Prompts: what the model reads, the reference answer, and the columns that reward functions may ask for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from chord_megatron.data.bad_rows import BadRow
from chord_megatron.data.columns import as_text, read_text
from chord_megatron.data.conversations import Conversation
from chord_megatron.data.formats import FINAL
from chord_megatron.data.sources import Row
from chord_megatron.data.turns import Turn
from chord_megatron.types import Prompt

FindReference = Callable[[str], str]


def make_prompt(index: int, row: Row, conversation: Conversation, turn: Turn, find_reference: FindReference) -> Prompt:
    """The prompt of row `index`. Raises BadRow."""
    return Prompt(
        id=index,
        text=turn.text,
        tokens=turn.tokens,
        reference=find_reference(reference_text(row, conversation)),
        columns=other_columns(row, conversation),
        prefill=turn.prefill,
    )


def other_columns(row: Row, conversation: Conversation) -> dict[str, Any]:
    """What reward functions may ask for: the row without what the prompt was made of."""
    return {name: row[name] for name in row if name != conversation.column}


def reference_text(row: Row, conversation: Conversation) -> str:
    """What a pattern takes the reference of. Raises BadRow."""
    if conversation.other != FINAL:
        return read_text(row, conversation.other)
    if conversation.answer is None:
        raise BadRow(f"column {conversation.column!r} does not end with an assistant's answer, and no column is one")
    return as_text(conversation.answer.get("content"), FINAL)


def reference_finder(pattern: str | None) -> FindReference:
    """Group 1 of data.reference_pattern, which raises BadRow where it finds nothing; or the whole text."""
    if pattern is None:
        return str.strip
    compiled = re.compile(pattern)

    def find(text: str) -> str:
        match = compiled.search(text)
        reference = (match[1] or "").strip() if match else ""
        if not reference:
            raise BadRow(f"data.reference_pattern={pattern!r} finds nothing", f" in {text[-80:]!r}")
        return reference

    return find
