"""Losses of the policy's own tokens: the surrogate, the level of its ratio, and the penalty of the reference.

A policy loss is a function `PolicyTokens -> TokenLoss`; what it needs beside the tokens, such as epsilon, is bound
where the objective is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from chord_megatron.algorithm.sequences import Sequences


class PolicyTokens(NamedTuple):
    """What a policy loss sees, [tokens] each. Outside `mask` the log-ratio is 0 and the loss does not count."""

    log_probs: Tensor  # of the policy, with gradient
    log_ratios: Tensor  # log(pi / pi_old) at the level of the objective, with gradient
    advantages: Tensor
    mask: Tensor  # bool
    sequences: Sequences  # of these tokens, for quantities of whole completions


class TokenLoss(NamedTuple):
    """What a policy loss returns, [tokens] each."""

    loss: Tensor
    is_clipped: Tensor  # bool: the loss has no gradient there, because a bound holds it


PolicyLoss = Callable[[PolicyTokens], TokenLoss]
# (log_probs, old_log_probs, mask, sequences) -> log_ratios
RatioLevel = Callable[[Tensor, Tensor, Tensor, Sequences], Tensor]


def token_log_ratios(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, sequences: Sequences) -> Tensor:
    """log(pi / pi_old) of each token by itself."""
    return log_probs - old_log_probs


def clipped_policy_loss(tokens: PolicyTokens, *, epsilon: float, epsilon_high: float) -> TokenLoss:
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) (PPO, arXiv 1707.06347, eq. 7; DAPO's two bounds)."""
    ratio = torch.exp(tokens.log_ratios)
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    surrogate, clipped = ratio * tokens.advantages, clipped_ratio * tokens.advantages
    return TokenLoss(-torch.min(surrogate, clipped), clipped < surrogate)


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """The non-negative estimate e^d - d - 1 of KL(pi || ref), d = ref - log_prob, [tokens] (Schulman's k3)."""
    difference = ref_log_probs - log_probs
    return torch.expm1(difference) - difference
