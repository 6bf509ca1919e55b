"""Rows -> ExpertSamples: the prompt as the policy reads it, the expert's answer, the token that ends it."""

from __future__ import annotations

from chord_megatron.data.bad_rows import BadRow
from chord_megatron.data.columns import as_text, read_column
from chord_megatron.data.conversations import MESSAGES_COLUMN, Conversation, Message
from chord_megatron.data.segments import Segment, TokenWeights, read_segments
from chord_megatron.data.sources import Row
from chord_megatron.data.turns import Turn, Turns
from chord_megatron.types import ExpertSample


def make_expert(
    index: int,
    row: Row,
    conversation: Conversation,
    turn: Turn,
    answer_column: str,
    turns: Turns,
    token_weights: TokenWeights,
) -> ExpertSample:
    """The expert sample of row `index`; its prompt tokens are those of the same row's `Prompt`. Raises BadRow."""
    message, segments = _read_answer(row, conversation, answer_column)
    answer = turns.answer(conversation, turn, message)
    weights = None
    if segments is not None:
        weights = token_weights.of(segments, answer, turn)
    elif conversation.answer_weight != 1.0:
        weights = (conversation.answer_weight,) * len(answer.tokens)
    return ExpertSample(
        index,
        (*turn.tokens, *answer.tokens),
        len(turn.tokens),
        None if weights is None else ((0.0,) * len(turn.tokens) + weights),
    )


def _read_answer(row: Row, conversation: Conversation, answer_column: str) -> tuple[Message, list[Segment] | None]:
    """The final assistant message of `messages`, or the column of answers, which may be in parts."""
    if conversation.column != MESSAGES_COLUMN:
        value = read_column(row, answer_column)
        segments = read_segments(value, answer_column)
        text = as_text(value if segments is None else "".join(part.text for part in segments), answer_column)
        return {"role": "assistant", "content": text}, segments
    answer = conversation.answer or {}
    if not (answer.get("content") or "").strip() and not answer.get("tool_calls"):
        raise BadRow(f"column {MESSAGES_COLUMN!r} does not end with an assistant's answer")
    return answer, None
