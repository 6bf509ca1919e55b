"""The experts that tokens are given in place of the routers' choice, through packing and back. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from chord_megatron.types import LIVE, GlobalBatch, MicroBatch


def pack_routing(rows: Sequence[Tensor | None], lengths: Sequence[int]) -> Tensor | None:
    """[sum of lengths, layers, top k] int16: `rows` one after the other, LIVE in place of None and behind them all.

    None where every row is. lengths: of the rows, and of the padding. Not shifted, as what predicts the next token is:
    a token's experts are those of its own position.
    """
    given = next((row for row in rows if row is not None), None)
    if given is None:
        return None
    parts = zip([*rows, None], lengths, strict=True)
    return torch.cat([given.new_full((n, *given.shape[1:]), LIVE) if row is None else row for row, n in parts])


def routed_live(batch: GlobalBatch) -> GlobalBatch:
    """The same batch, in which the routers choose for every token."""
    return replace(batch, micro_batches=tuple(replace(each, routing=None) for each in batch.micro_batches))


def rows_in_step(batch: MicroBatch, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of each row but padding: its place among the tokens of the step's samples, and which of `input_ids` it is.

    [rows] int64 both, on the host. lengths: of the samples, whose tokens stand one behind the other.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    bounds, positions = batch.cu_seqlens.tolist(), batch.positions.cpu()
    empty = torch.empty(0, dtype=torch.int64)
    places, rows = [empty], [empty]
    for index, (start, stop) in zip(batch.sample_indices, itertools.pairwise(bounds)):
        of_sample = positions[start:stop]
        is_token = of_sample < lengths[index]  # else padding, in a context-parallel rank's share of the sequence
        places.append(starts[index] + of_sample[is_token])
        rows.append(torch.arange(start, stop)[is_token])
    own = torch.cat(rows)
    return torch.cat(places), own if batch.token_of is None else batch.token_of.cpu()[own]
