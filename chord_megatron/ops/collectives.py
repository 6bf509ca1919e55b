"""Collectives of tensors whose length differs from rank to rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_ragged(values: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's `values`, in order of the ranks. values: [any], on the group's device; the same dtype everywhere."""
    sizes = torch.zeros(group.size(), dtype=torch.int64, device=values.device)
    sizes[group.rank()] = len(values)
    dist.all_reduce(sizes, group=group)
    longest = int(sizes.max())
    padded = torch.cat([values, values.new_zeros(longest - len(values))])
    gathered = [torch.empty_like(padded) for _ in range(group.size())]
    dist.all_gather(gathered, padded, group=group)
    return [share[:size] for share, size in zip(gathered, sizes.tolist())]
