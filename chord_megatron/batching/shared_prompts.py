"""A prompt that several sequences of a micro-batch begin with, read once. Pure.

The model then reads fewer tokens than the sequences have. What the loss reads stays as it is: a row for each token of
each sequence, and `token_of` names the token whose hidden state predicts the row's label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from chord_megatron.batching.routing import pack_routing
from chord_megatron.types import MicroBatch, Segment, TrainingSample


def prompt_groups(samples: Sequence[TrainingSample], order: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(tokens that they begin with, numbers of samples): those of one prompt together, in the order of the first ones.

    A prompt is what stands before the first token that is learnt. Of a sample that shares its prompt with none it
    counts 0 tokens. A prompt whose experts are given is another one than that whose routers choose.
    """
    groups: dict[tuple[tuple[int, ...], bool], list[int]] = {}
    for index in order:
        groups.setdefault((_prompt(samples[index]), samples[index].routing is None), []).append(index)
    return [(len(prompt) if len(rows) > 1 else 0, rows) for (prompt, _), rows in groups.items()]


def share_prompts(batch: MicroBatch, samples: Sequence[TrainingSample], pad_to_multiple: int) -> MicroBatch:
    """The same rows from each prompt read once, by the experts that the first of its sequences has for it.

    samples: of the whole step.
    """
    groups = prompt_groups(samples, batch.sample_indices)
    if not any(prefix for prefix, _ in groups):
        return batch
    bounds = batch.cu_seqlens.tolist()
    row_of = dict(zip(batch.sample_indices, bounds))  # the first one of each sample
    read: list[int] = []  # rows, in the order in which the model reads their tokens
    segments: list[Segment] = []
    token_of = torch.zeros(len(batch.labels), dtype=torch.int64)

    def append(first_row: int, length: int, prompt: Segment | None = None) -> Segment:
        start = len(read)
        token_of[first_row : first_row + length] = torch.arange(start, start + length)
        read.extend(range(first_row, first_row + length))
        segments.append(Segment(start, length, *(prompt or ())[:2]))
        return segments[-1]

    for prefix, rows in groups:
        prompt = append(row_of[rows[0]], prefix) if prefix else None
        for index in rows:
            first_row, length = row_of[index], len(samples[index].tokens)
            if prompt:
                token_of[first_row : first_row + prefix] = torch.arange(prompt.start, prompt.start + prefix)
            if length > prefix:
                append(first_row + prefix, length - prefix, prompt)
    padding = -len(read) % pad_to_multiple
    if padding:
        segments.append(Segment(len(read), padding))
    places = torch.tensor(read)
    zeros = torch.zeros(padding, dtype=torch.int64)
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids[places], zeros]),
        position_ids=torch.cat([batch.position_ids[places], zeros]),
        is_token=torch.arange(len(read) + padding) < len(read),
        routing=None if batch.routing is None else pack_routing([batch.routing[places]], [len(read), padding]),
        segments=tuple(segments),
        token_of=token_of,
    )


def _prompt(sample: TrainingSample) -> tuple[int, ...]:
    learnt = sample.loss_mask.nonzero()
    return tuple(sample.tokens[: int(learnt[0]) if len(learnt) else len(sample.tokens)].tolist())
