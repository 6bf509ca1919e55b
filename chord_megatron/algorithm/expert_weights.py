"""Weights of expert tokens: functions `(log_probs, entropy) -> weights`, [tokens] each, without gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ExpertWeight = Callable[[Tensor, Tensor], Tensor]


def uniform(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """1: plain supervised learning (CHORD-mu)."""
    return torch.ones_like(log_probs, requires_grad=False)


def phi(log_probs: Tensor, entropy: Tensor, *, cutoff: float | None = None) -> Tensor:
    """p (1 - p): the policy learns where it is unsure (CHORD-phi, arXiv 2508.11408, section 4.2).

    `-exp(lp) * expm1(lp)` keeps its digits where p is close to 1. Tokens of p above `cutoff` are not learnt: they have
    the gradient of Trinity-RFT's `cutoff_prob`, which is none.
    """
    log_probs = log_probs.detach()
    weights = -torch.exp(log_probs) * torch.expm1(log_probs)
    return weights if cutoff is None else torch.where(log_probs > math.log(cutoff), 0.0, weights)


def probability(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """p: the importance weight of the expert's token (Trinity-RFT's SFT-IS; DFT, arXiv 2508.05629, eq. 9)."""
    return torch.exp(log_probs.detach())


def luffy(log_probs: Tensor, entropy: Tensor, *, gamma: float = 0.1) -> Tensor:
    """gamma p / (p + gamma)^2: -log p then has the gradient of LUFFY's shaped p / (p + gamma) (arXiv 2504.14945).

    With x = p / (p + gamma) it is x (1 - x), and x the logistic function of log p - log gamma.
    """
    logits = log_probs.detach() - math.log(gamma)
    return torch.sigmoid(logits) * torch.sigmoid(-logits)


def entropy_aware(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """exp(-H) / 2: the surer the policy is of anything, the more it learns (SRFT, arXiv 2506.19767)."""
    return torch.exp(-entropy.detach()) / 2


EXPERT_WEIGHTS: Mapping[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "phi": phi,
    "probability": probability,
    "luffy": luffy,
    "entropy": entropy_aware,
}
