"""Rows -> ExpertSamples: the prompt as the policy reads it, the expert's answers, the tokens that end them."""

from __future__ import annotations

from chord_megatron.data.bad_rows import BadRow
from chord_megatron.data.columns import as_text, read_column
from chord_megatron.data.conversations import Conversation
from chord_megatron.data.formats import FINAL
from chord_megatron.data.messages import Message
from chord_megatron.data.segments import Segment, TokenWeights, read_segments
from chord_megatron.data.sources import Row
from chord_megatron.data.turns import UNREAD, Turn, Turns
from chord_megatron.types import ExpertSample


def make_expert(
    index: int, row: Row, conversation: Conversation, turn: Turn, turns: Turns, token_weights: TokenWeights
) -> ExpertSample:
    """The expert sample of row `index`; its prompt tokens are those of the same row's `Prompt`. Raises BadRow.

    Where earlier turns are learnt, too, its prompt ends with the first of them.
    """
    tokens, weights = _final_answer(row, conversation, turn, turns, token_weights)
    if not conversation.learnt or UNREAD in turn.tokens[:1]:
        all_weights = None if weights is None else ((0.0,) * len(turn.tokens) + weights)
        # A text of its own may have nothing before it: its first token follows none.
        return ExpertSample(index, (*turn.tokens, *tokens), len(turn.tokens) or 1, all_weights)
    before = [0.0] * len(turn.tokens)
    spans = [(turns.earlier(conversation, turn, place), weight) for place, weight in conversation.learnt]
    for span, weight in spans:
        before[span.start : span.stop] = [weight] * len(span)
    end = len(before) if tokens else spans[-1][0].stop  # what follows the last turn that is learnt is of no use
    return ExpertSample(
        index,
        (*turn.tokens[:end], *tokens),
        spans[0][0].start,
        (*before[:end], *((1.0,) * len(tokens) if weights is None else weights)),
    )


def _final_answer(
    row: Row, conversation: Conversation, turn: Turn, turns: Turns, token_weights: TokenWeights
) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    """Tokens and their weights, None for 1 each; no tokens where it is not learnt, but earlier turns are."""
    message, segments = _read_answer(row, conversation)
    if message is None or conversation.answer_weight == 0:
        if not conversation.learnt:
            raise BadRow(f"column {conversation.column!r} leaves every answer out of the loss", "; leave such rows out")
        return (), None
    answer = turns.answer(conversation, turn, message)
    if segments is not None:
        return answer.tokens, token_weights.of(segments, answer, turn)
    weight = conversation.answer_weight
    return answer.tokens, None if weight == 1 else (weight,) * len(answer.tokens)


def _read_answer(row: Row, conversation: Conversation) -> tuple[Message | None, list[Segment] | None]:
    """The final assistant message, or the column of answers, which may be in parts; None where earlier ones answer."""
    column = conversation.other
    if column != FINAL:
        value = read_column(row, column)
        segments = read_segments(value, column)
        text = as_text(value if segments is None else "".join(part.text for part in segments), column)
        return {"role": "assistant", "content": text}, segments
    answer = conversation.answer or {}
    if (answer.get("content") or "").strip() or answer.get("tool_calls"):
        return answer, None
    if conversation.learnt:
        return None, None
    raise BadRow(f"column {conversation.column!r} does not end with an assistant's answer")
