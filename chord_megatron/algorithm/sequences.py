"""Quantities of whole sequences, for each of their packed tokens. The one place that knows `cu_seqlens`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """The sequences of a micro-batch. Each is summed by itself: its neighbours and its place leave no rounding."""

    cu_seqlens: Tensor  # [num_sequences + 1], bounds of whole sequences that cover all tokens

    def sum(self, values: Tensor) -> Tensor:
        """[tokens]: for each token the sum over its sequence."""
        lengths = self.cu_seqlens.diff().long()
        sequence = torch.repeat_interleave(lengths, output_size=len(values))  # without the size a GPU would wait for it
        return values.new_zeros(len(lengths)).index_add(0, sequence, values)[sequence]

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """[tokens]: for each token the mean over its sequence's tokens in `mask`; `values` are 0 outside it."""
        return self.sum(values) / self.sum(mask.to(values.dtype)).clamp(min=1.0)
