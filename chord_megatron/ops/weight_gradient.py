"""Where the gradient of a weight accumulates: straight in Megatron-Core's main gradient where there is one.

The same as gradient_accumulation_fusion in LinearWithGradAccumulationAndAsyncCommunication
(megatron/core/tensor_parallel/layers.py). The hook of DistributedDataParallel demands a returned gradient even so;
it adds that to the main gradient only under zero_out_wgrad, set where an embedding adds to the same weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


class WeightGradient:
    """dW in `sums`, of type `dtype`, to be added to: the weight's main gradient if it has one, else zeros."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight
        main_grad: Tensor | None = getattr(weight, "main_grad", None)
        # Without the flag, no hook would know that the gradient is there already.
        can_add = main_grad is not None and main_grad.dtype == dtype and hasattr(weight, "grad_added_to_main_grad")
        self.sums = main_grad if main_grad is not None and can_add else torch.zeros_like(weight, dtype=dtype)
        self.in_main_grad = self.sums is main_grad

    def finish(self) -> Tensor:
        """What the backward pass returns: dW in the weight's type, or what stands for it."""
        if not self.in_main_grad:
            return self.sums.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        if getattr(self.weight, "zero_out_wgrad", False):
            return self.weight.new_zeros(()).expand_as(self.weight)
        return torch.empty_like(self.weight)
