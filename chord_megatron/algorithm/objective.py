"""The CHORD objective of packed tokens: what is minimised, its loss, and the sums that describe it.

    L = (1 - mu) * sum_R a_t * l_t  +  mu * sum_E b_t * w_t * (-log pi(y*_t))

The weights a_t and b_t carry their global denominators, so the loss of an optimizer step is the plain sum
of these results over its micro-batches and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chord_megatron.algorithm.diagnosis import expert_row_sums, stream_sums
from chord_megatron.algorithm.expert_weights import ExpertWeight, uniform
from chord_megatron.algorithm.importance import ImportanceCorrection, importance_weights, log_importance_ratios
from chord_megatron.algorithm.policy_losses import (
    PolicyLoss,
    PolicyTokens,
    RatioLevel,
    TokenLoss,
    kl_penalty,
    token_log_ratios,
)
from chord_megatron.algorithm.sequences import Sequences
from chord_megatron.types import LossResult, MicroBatch


@dataclass(frozen=True)
class Objective:
    """What CHORD minimises, but for mu, which has a schedule."""

    policy_loss: PolicyLoss
    ratio_level: RatioLevel = token_log_ratios
    expert_weight: ExpertWeight = uniform
    beta: float = 0.0  # coefficient of the KL penalty against the reference
    importance: ImportanceCorrection | None = None  # against the sampler's log-probs


def chord_loss(log_probs: Tensor, entropy: Tensor, batch: MicroBatch, *, objective: Objective, mu: float) -> LossResult:
    """The CHORD loss of one micro-batch, attached to the graph even where both streams are empty.

    log_probs, entropy: [tokens], of each position's label, at the token's own temperature.
    """
    # float64 sums: their rounding must not depend on how the step was cut into micro-batches.
    policy_losses, sums, maxima = _policy_losses(log_probs, batch, objective)
    loss_rollout = (batch.rollout_weights * policy_losses).sum(dtype=torch.float64)
    expert_losses = -log_probs * objective.expert_weight(log_probs.detach(), entropy.detach())
    loss_expert = (batch.expert_weights * expert_losses).sum(dtype=torch.float64)
    loss = (1 - mu) * loss_rollout + mu * loss_expert
    return LossResult(
        loss,
        sums={
            "loss_rollout": loss_rollout.detach(),
            "loss_expert": loss_expert.detach(),
            "entropy": _sum_within(batch.rollout_mask, entropy),
            **stream_sums(log_probs, entropy, batch),
            **sums,
        },
        maxima=maxima,
        rows=expert_row_sums(log_probs, entropy, batch),
    )


def _policy_losses(
    log_probs: Tensor, batch: MicroBatch, objective: Objective
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The loss of each token as if it were a rollout's, and the sums and maxima that describe the rollout tokens."""
    mask, sequences, detached = batch.rollout_mask, Sequences(batch.cu_seqlens), log_probs.detach()
    # Outside its mask a stream sees its own log-probs, so that exp() never overflows into 0 * inf.
    old_log_probs = detached if batch.old_log_probs is None else torch.where(mask, batch.old_log_probs, detached)
    log_ratios = objective.ratio_level(log_probs, old_log_probs, mask, sequences)
    loss, is_clipped = objective.policy_loss(PolicyTokens(log_probs, log_ratios, batch.advantages, mask, sequences))

    log_weights = log_importance_ratios(old_log_probs, batch.rollout_log_probs, mask)
    loss, is_weight_clipped = _weighted(loss, log_weights, mask, sequences, objective.importance)

    kl = torch.zeros_like(detached)
    if batch.ref_log_probs is not None:
        kl = kl_penalty(log_probs, torch.where(mask, batch.ref_log_probs, detached))
        loss = loss + objective.beta * kl

    comparable = mask & batch.rollout_log_probs.isfinite()
    difference = torch.where(comparable, (detached - batch.rollout_log_probs).abs(), 0.0).double()
    sums = {
        "kl": _sum_within(mask, kl),
        "clipped": _sum_within(mask, is_clipped),
        "log_prob_diff": difference.sum(),
        "importance_ratio": _sum_within(comparable, log_weights.exp()),
        "importance_ratio_squared": _sum_within(comparable, (2 * log_weights).exp()),
        "importance_clipped": _sum_within(mask, is_weight_clipped),
        "non_finite_rollout_log_probs": _sum_within(mask, ~comparable),
    }
    return loss, sums, {"log_prob_diff": difference.max()}


def _weighted(
    loss: Tensor, log_ratios: Tensor, mask: Tensor, sequences: Sequences, correction: ImportanceCorrection | None
) -> TokenLoss:
    """The policy loss times its importance weights, and where the threshold changed one.

    Not for the KL penalty: a masked token must still be held near the reference (as in TRL).
    """
    if correction is None:
        return TokenLoss(loss, torch.zeros_like(mask))
    weights, is_clipped = importance_weights(log_ratios, mask, sequences, correction)
    return TokenLoss(weights.to(loss.dtype) * loss, is_clipped)


def _sum_within(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask, values.detach().double(), 0.0).sum()
