"""Rows -> ExpertSamples: the prompt as the policy reads it, the expert's answer, the token that ends it."""

from __future__ import annotations

from chord_megatron.data.bad_rows import BadRow
from chord_megatron.data.columns import read_text
from chord_megatron.data.conversations import MESSAGES_COLUMN, Conversation, Message
from chord_megatron.data.sources import Row
from chord_megatron.data.turns import Turn, Turns
from chord_megatron.types import ExpertSample


def make_expert(
    index: int, row: Row, conversation: Conversation, turn: Turn, answer_column: str, turns: Turns
) -> ExpertSample:
    """The expert sample of row `index`; its prompt tokens are those of the same row's `Prompt`. Raises BadRow."""
    answer = turns.answer(conversation, turn, _read_answer(row, conversation, answer_column))
    return ExpertSample(index, (*turn.tokens, *answer), len(turn.tokens))


def _read_answer(row: Row, conversation: Conversation, answer_column: str) -> Message:
    """The final assistant message of `messages`, or the column of answers."""
    if conversation.column != MESSAGES_COLUMN:
        return {"role": "assistant", "content": read_text(row, answer_column)}
    answer = conversation.answer or {}
    if not (answer.get("content") or "").strip() and not answer.get("tool_calls"):
        raise BadRow(f"column {MESSAGES_COLUMN!r} does not end with an assistant's answer")
    return answer
