"""Quantities of whole sequences, for each of their packed tokens. The one place that knows `cu_seqlens`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """The sequences of a micro-batch. Each is summed by itself: its neighbours and its place leave no rounding."""

    cu_seqlens: Tensor  # [num_sequences + 1], bounds of whole sequences that cover all tokens

    def totals(self, values: Tensor) -> Tensor:
        """[sequences]: the sum over each of values [tokens]."""
        return values.new_zeros(len(self.cu_seqlens) - 1).index_add(0, self._of_tokens(values), values)

    def sum(self, values: Tensor) -> Tensor:
        """[tokens]: for each token the sum over its sequence."""
        return self.totals(values)[self._of_tokens(values)]

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """[tokens]: for each token the mean over its sequence's tokens in `mask`; `values` are 0 outside it."""
        return self.sum(values) / self.sum(mask.to(values.dtype)).clamp(min=1.0)

    def _of_tokens(self, values: Tensor) -> Tensor:
        lengths = self.cu_seqlens.diff().long()
        return torch.repeat_interleave(lengths, output_size=len(values))  # without the size a GPU would wait for it
