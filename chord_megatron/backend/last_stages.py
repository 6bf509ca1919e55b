"""What the last stages of a pass have found, brought to every rank; each function is a collective call of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from chord_megatron.backend.groups import ParallelGroups
from chord_megatron.types import GlobalBatch, LossResult, LossTotals


def gather_rows(batch: GlobalBatch, outputs: Sequence[dict[int, Tensor]], groups: ParallelGroups) -> list[Tensor]:
    """[length] of each sample, on the host. outputs: those that a last stage has, by sample, each its own tokens."""
    values = torch.zeros(sum(batch.lengths), device=groups.device)
    rows = values.split(batch.lengths)
    for index, row in (item for output in outputs for item in output.items()):
        rows[index].copy_(row)
    if groups.is_last_stage:
        dist.all_reduce(values, group=groups.dp_cp_group)
    if groups.pp_size > 1:
        dist.broadcast(values, groups.last_stage_rank, group=groups.pp_group)
    return list(values.cpu().split(batch.lengths))


def reduce_results(batch: GlobalBatch, outputs: Sequence[LossResult], groups: ParallelGroups) -> LossTotals:
    """Add sums, compare maxima and collect rows over micro-batches and ranks.

    outputs: of this rank's micro-batches, in their order.
    """
    totals = [LossTotals({}, {}, {})]
    if groups.is_last_stage:
        group = groups.dp_cp_group
        sums = torch.stack([torch.stack([*output.sums.values()]) for output in outputs]).sum(0)
        maxima = torch.stack([torch.stack([*output.maxima.values()]) for output in outputs]).amax(0)
        rows = sums.new_zeros(len(outputs[0].rows), len(batch.lengths))  # of each sample, 0 where others have it
        for micro_batch, output in zip(batch.micro_batches, outputs):
            indices = torch.tensor(micro_batch.sample_indices, dtype=torch.int64, device=rows.device)
            for row, values in zip(rows, output.rows.values()):
                row[indices] = values[: len(indices)]
        dist.all_reduce(sums, group=group)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        dist.all_reduce(rows, group=group)
        named = (zip(of_first, found.tolist()) for of_first, found in zip(outputs[0][1:], (sums, maxima, rows)))
        of_sums, of_maxima, of_rows = map(dict, named)
        totals = [LossTotals(of_sums, of_maxima, of_rows)]
    if groups.pp_size > 1:
        dist.broadcast_object_list(totals, groups.last_stage_rank, group=groups.pp_group)
    return totals[0]
