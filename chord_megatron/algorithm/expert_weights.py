"""Weights of expert tokens: functions `(log_probs, entropy) -> weights`, [tokens] each, without gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ExpertWeight = Callable[[Tensor, Tensor], Tensor]


def uniform(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """1: plain supervised learning (CHORD-mu)."""
    return torch.ones_like(log_probs, requires_grad=False)


def phi(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """p (1 - p): the policy learns where it is unsure (CHORD-phi, arXiv 2508.11408, section 4.2).

    `-exp(lp) * expm1(lp)` keeps its digits where p is close to 1.
    """
    log_probs = log_probs.detach()
    return -torch.exp(log_probs) * torch.expm1(log_probs)
