"""Quantities of whole sequences, for each of their packed tokens. The one place that knows `cu_seqlens`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """The sequences of a micro-batch. Each is summed by itself: its neighbours and its place leave no rounding.

    With a group, other ranks have other tokens of the same sequences: sums and means are collective calls of them.
    """

    cu_seqlens: Tensor  # [num_sequences + 1], bounds of the sequences' tokens here, which are all of [tokens]
    group: dist.ProcessGroup | None = None

    def totals(self, values: Tensor) -> Tensor:
        """[sequences]: the sum over the tokens of each that are here, of values [tokens]."""
        return values.new_zeros(len(self.cu_seqlens) - 1).index_add(0, self._of_tokens(values), values)

    def sum(self, values: Tensor) -> Tensor:
        """[tokens]: for each token the sum over its sequence."""
        totals = self.totals(values)
        if self.group is not None:
            totals = _SumOverRanks.apply(totals, self.group)
        return totals[self._of_tokens(values)]

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """[tokens]: for each token the mean over its sequence's tokens in `mask`; `values` are 0 outside it."""
        return self.sum(values) / self.sum(mask.to(values.dtype)).clamp(min=1.0)

    def _of_tokens(self, values: Tensor) -> Tensor:
        lengths = self.cu_seqlens.diff().long()
        return torch.repeat_interleave(lengths, output_size=len(values))  # without the size a GPU would wait for it


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks of a group. Each uses it in a loss of its own, and what counts is the sum of these.

    So the gradient is a sum, too. (torch.distributed.nn.functional.all_reduce does the same, and is deprecated.)
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


def _summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values, group=group)
    return values
