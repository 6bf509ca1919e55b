"""Collectives of tensors whose length differs from rank to rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_ragged(values: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's `values`, in order of the ranks. values: [any], on the group's device; the same dtype everywhere.

    A sum in which all others have zeros: it takes the memory of all values once, however unequal the shares are.
    """
    sizes = torch.zeros(group.size(), dtype=torch.int64, device=values.device)
    sizes[group.rank()] = len(values)
    dist.all_reduce(sizes, group=group)
    everything = values.new_zeros(int(sizes.sum()))
    shares = everything.split(sizes.tolist())
    shares[group.rank()].copy_(values)
    dist.all_reduce(everything, group=group)
    return list(shares)
