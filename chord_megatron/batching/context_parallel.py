"""Context parallelism: each rank's share of every sequence of a micro-batch. Pure functions.

A sequence is filled up to 2 x CP chunks of one length, and rank r has chunks r and 2 CP - 1 - r of it: an early one
that attends to little and a late one that attends to much, so that causal attention costs all ranks the same. It is the
division of Megatron-Core (`get_batch_on_this_cp_rank`) and TransformerEngine (`thd_get_partitioned_indices`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from chord_megatron.types import LIVE, MicroBatch


def share_of_rank(batch: MicroBatch, rank: int, size: int, pad_to_multiple: int) -> MicroBatch:
    """What `rank` of `size` context-parallel ranks has of a micro-batch of whole sequences, the padding made anew.

    pad_to_multiple: of the share's token count. Padding counts for nothing; behind a sequence, positions go on.
    """
    bounds = [*pairwise(batch.cu_seqlens[: len(batch.sample_indices) + 1].tolist())]
    positions = [_positions(end - start, rank, size) for start, end in bounds]
    lengths = [len(own) for own in positions]
    multiple = math.lcm(2, pad_to_multiple)  # of two chunks, too
    padding = -(-max(sum(lengths), 1) // multiple) * multiple - sum(lengths)  # a micro-batch is never empty
    filler = len(batch.input_ids)
    source = torch.cat(
        [
            *(torch.where(own < end - start, start + own, filler) for (start, end), own in zip(bounds, positions)),
            torch.full((padding,), filler),
        ]
    )
    if padding:
        lengths.append(padding)

    def taken(values: Tensor, fill: float = 0.0) -> Tensor:
        return torch.cat([values, values.new_full((1, *values.shape[1:]), fill)])[source]

    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    per_token = {name: v for name, v in vars(batch).items() if isinstance(v, Tensor) and name != "cu_seqlens"}
    fields: dict[str, Any] = {name: taken(values) for name, values in per_token.items()}
    fields["position_ids"] = torch.cat([*positions, torch.zeros(padding, dtype=torch.int64)])
    fields["temperatures"] = taken(batch.temperatures, fill=1.0)  # padding divides by 1, not by 0
    if batch.routing is not None:
        fields["routing"] = taken(batch.routing, fill=LIVE)
    num_tokens = int((source < batch.num_tokens).sum())
    return replace(batch, **fields, cu_seqlens=cu_seqlens, num_tokens=num_tokens, max_seqlen=max(lengths))


def _positions(length: int, rank: int, size: int) -> Tensor:
    """[2 x chunk]: which positions of a sequence of `length` tokens are a rank's; some may lie behind its end."""
    chunk = -(-length // (2 * size))
    return torch.cat([torch.arange(chunk) + number * chunk for number in (rank, 2 * size - 1 - rank)])
