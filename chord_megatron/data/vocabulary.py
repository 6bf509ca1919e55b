"""Token ids against the model's vocabulary: a tokenizer with tokens added, on a model that was not resized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chord_megatron.config import Config
from chord_megatron.data.load import RunData
from chord_megatron.data.mixture import parts_of
from chord_megatron.data.samples import Sample, holds_token_beyond
from chord_megatron.data.tokenizer import generation_end_tokens
from chord_megatron.system.errors import UserError
from chord_megatron.types import foreign_tokens

_REMEDY = (
    "use the tokenizer that belongs to the model, or give the added tokens rows of their own by transformers' "
    "resize_token_embeddings(len(tokenizer))"
)


def check_vocabulary(config: Config, tokenizer: Any, vocab_size: int, data: RunData | None = None) -> None:
    """Raise UserError where an end token or a row has a token that the model has no row for.

    Under tensor parallelism such a token would be a vector of zeros without a word, and an IndexError otherwise.
    """
    sources = (*_end_tokens(config, tokenizer), *(_rows(config, data, vocab_size) if data else ()))
    foreign = [(where, token) for where, tokens in sources for token in foreign_tokens(tokens, vocab_size)]
    if foreign:
        where, first = foreign[0]
        raise UserError(
            f"{where} has token {first}, of which a model of vocab_size {vocab_size} has no row "
            f"(the largest here is {max(token for _, token in foreign)}); {_REMEDY}"
        )


def _end_tokens(config: Config, tokenizer: Any) -> Iterator[tuple[str, Sequence[int]]]:
    yield "the tokenizer's eos_token", (tokenizer.eos_token_id,)
    if config.rollout.stop_token_ids is None:  # those are checked with the rest of the configuration
        model_dir = Path(config.model.path)
        yield f"{model_dir}/generation_config.json", generation_end_tokens(model_dir)


def _rows(config: Config, data: RunData, vocab_size: int) -> Iterator[tuple[str, Sequence[int]]]:
    yield "the chat template's end of a turn", sorted(data.end_token_ids)
    yield from _rows_of(config.data.dataset, data.prompts, vocab_size)
    yield from _rows_of(config.data.eval_dataset, data.eval_prompts, vocab_size)
    yield from _rows_of(config.chord.chord_sft_dataset, data.experts, vocab_size)


def _rows_of(data_set: object, samples: Sequence[Sample], vocab_size: int) -> Iterator[tuple[str, Sequence[int]]]:
    """Of those parts of a data set that may hold such a token."""
    for part in parts_of(samples, str(data_set)):
        for row in part.samples if holds_token_beyond(part.samples, vocab_size) else ():
            yield f"{part.path} row {row.id - part.first_id}", row.tokens
