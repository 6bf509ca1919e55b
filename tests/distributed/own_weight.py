"""A user's weight of expert tokens."""

import torch
from torch import Tensor


def unsure(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """H / (1 + p)."""
    return entropy / (1 + torch.exp(log_probs))
