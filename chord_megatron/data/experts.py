"""Rows -> ExpertSamples: the prompt as the policy reads it, the expert's answer, the end-of-turn token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chord_megatron.data.prompts import MESSAGES_COLUMN, PromptFormat, encode_prompt, read_prompt, read_text
from chord_megatron.data.sources import Rows
from chord_megatron.system.errors import UserError
from chord_megatron.types import ExpertSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_experts(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    prompt_column: str,
    answer_column: str,
    prompt_format: PromptFormat,
    system_prompt: str | None,
    end_token_id: int,
    max_length: int,
) -> tuple[list[ExpertSample], int]:
    """The expert samples of `rows`, and how many were dropped for having more than `max_length` tokens.

    Prompt and answer are tokenised apart, so that the prompt tokens are those of the same row's `Prompt`.
    A row without `prompt_column` may have ms-swift's `messages`, whose final assistant message is the answer.
    Raises UserError naming `source`, the row and the column where a row cannot be used.
    """
    if not len(rows):
        raise UserError(f"{source} has no rows")
    samples = []
    for index, row in enumerate(rows):
        where = f"{source} row {index}"
        column, prompt, final_message = read_prompt(row, prompt_column, where)
        is_conversation = column == MESSAGES_COLUMN
        answer = (final_message or "") if is_conversation else read_text(row, answer_column, where)
        if not answer.strip():
            raise UserError(f"{where}: column {column!r} does not end with an assistant's answer")
        _, prompt_tokens = encode_prompt(prompt, tokenizer, prompt_format, system_prompt, where)
        tokens = (*prompt_tokens, *tokenizer.encode(answer, add_special_tokens=False))
        if tokens[-1] != end_token_id:
            tokens = (*tokens, end_token_id)
        if len(tokens) <= max_length:
            samples.append(ExpertSample(index, tokens, len(prompt_tokens)))
    if not samples:
        raise UserError(f"all {len(rows)} rows of {source} are longer than chord.chord_sft_max_length={max_length}")
    return samples, len(rows) - len(samples)
