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
    bounds = batch.cu_seqlens.tolist()
    rows = [torch.arange(start, stop) for start, stop in itertools.pairwise(bounds)][: len(batch.sample_indices)]
    places = [starts[index] + row - row[0] for index, row in zip(batch.sample_indices, rows)]
    own = torch.cat([torch.empty(0, dtype=torch.int64), *rows])
    return torch.cat([own[:0], *places]), own if batch.token_of is None else batch.token_of.cpu()[own]
