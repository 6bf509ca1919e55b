"""The CHORD objective of packed tokens: what is minimised, its loss, and the sums that describe it.

    L = (1 - mu) * sum_R a_t * l_t  +  mu * sum_E b_t * w_t * (-log pi(y*_t))

The weights a_t and b_t carry their global denominators, so the loss of an optimizer step is the plain sum
of these results over its micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from chord_megatron.algorithm.diagnosis import row_sums, stream_sums
from chord_megatron.algorithm.expert_weights import ExpertWeight, uniform
from chord_megatron.algorithm.importance import (
    ImportanceCorrection,
    importance_weights,
    log_importance_ratios,
    off_policy_sequences,
)
from chord_megatron.algorithm.policy_losses import (
    KL_ESTIMATORS,
    PolicyLoss,
    PolicyTokens,
    RatioLevel,
    token_log_ratios,
)
from chord_megatron.algorithm.sequences import Sequences
from chord_megatron.types import LossResult, MicroBatch

KLPenalty = Callable[[Tensor, Tensor], Tensor]  # (log_probs, ref_log_probs) -> [tokens]


@dataclass(frozen=True)
class Objective:
    """What CHORD minimises, but for mu, which has a schedule."""

    policy_loss: PolicyLoss
    ratio_level: RatioLevel = token_log_ratios
    expert_weight: ExpertWeight = uniform
    beta: float = 0.0  # coefficient of the KL penalty against the reference
    kl_estimator: KLPenalty = KL_ESTIMATORS["k3"]
    kl_in_reward: bool = False  # the penalty is in the advantages, and here only measured
    entropy_coef: float = 0.0  # of the mean entropy, which is taken from the loss
    importance: ImportanceCorrection | None = None  # against the sampler's log-probs
    log_ratio_bound: float | None = None  # log(pi / pi_old) is kept within +-this
    weighs_kl: bool = False  # by the importance weights
    off_policy_delta: float | None = None  # of `off_policy_sequences`, which lose their policy loss
    old_is_sampler: bool = False  # pi_old is the policy that sampled, by its own numbers
    is_scaled_by_advantage: bool = True  # the policy loss: where the advantage is 0, so are it and its gradient

    @property
    def needs_idle_rows(self) -> bool:
        """Whether a rollout token whose advantage is 0 has a gradient: by a penalty, a bonus, or a loss of its own."""
        penalizes = self.beta > 0 and not self.kl_in_reward
        return penalizes or self.entropy_coef > 0 or not self.is_scaled_by_advantage


def chord_loss(
    log_probs: Tensor,
    entropy: Tensor,
    batch: MicroBatch,
    *,
    objective: Objective,
    mu: float,
    cp_group: dist.ProcessGroup | None = None,
) -> LossResult:
    """The CHORD loss of one micro-batch, attached to the graph even where both streams are empty.

    log_probs, entropy: [tokens], of each position's label, at the token's own temperature. cp_group: the ranks that
    have other tokens of the same sequences; it is then a collective call of them, and the loss is the sum of theirs.
    """
    sequences = Sequences(batch.cu_seqlens, cp_group)
    # float64 sums: their rounding must not depend on how the step was cut into micro-batches.
    policy_losses, sums, maxima = _policy_losses(log_probs, batch, sequences, objective)
    if objective.entropy_coef:
        policy_losses = policy_losses - objective.entropy_coef * torch.where(batch.rollout_mask, entropy, 0.0)
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
        rows=row_sums(log_probs, entropy, batch, sequences),
    )


def _policy_losses(
    log_probs: Tensor, batch: MicroBatch, sequences: Sequences, objective: Objective
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The loss of each token as if it were a rollout's, and the sums and maxima that describe the rollout tokens."""
    mask, detached = batch.rollout_mask, log_probs.detach()
    old_log_probs = _old_log_probs(detached, batch, objective)
    log_ratios = objective.ratio_level(log_probs, old_log_probs, mask, sequences)
    if objective.log_ratio_bound is not None:
        log_ratios = log_ratios.clamp(-objective.log_ratio_bound, objective.log_ratio_bound)
    loss, *is_clipped = objective.policy_loss(PolicyTokens(log_probs, log_ratios, batch.advantages, mask, sequences))

    is_off = torch.zeros_like(mask)
    if objective.off_policy_delta is not None:
        log_drift = log_importance_ratios(log_probs, batch.rollout_log_probs, mask)
        is_off = off_policy_sequences(log_drift, batch.advantages, mask, sequences, objective.off_policy_delta)
        loss = torch.where(is_off, 0.0, loss)
    kl = torch.zeros_like(detached)
    if batch.ref_log_probs is not None:
        kl = objective.kl_estimator(log_probs, torch.where(mask, batch.ref_log_probs, detached))
    penalty = torch.zeros_like(kl) if objective.kl_in_reward else objective.beta * kl
    log_weights = log_importance_ratios(old_log_probs, batch.rollout_log_probs, mask)
    # A masked token must still be held near the reference, as in TRL; ms-swift weights the penalty, too.
    weighted, unweighted = (loss + penalty, 0.0) if objective.weighs_kl else (loss, penalty)
    loss, is_weight_clipped = _weighted(weighted, log_weights, mask, sequences, objective.importance)
    loss = loss + unweighted

    low, high = (torch.zeros_like(mask) if held is None else held for held in is_clipped)
    of_sampler, maxima = _against_sampler(detached, log_weights, batch)
    sums = {
        "kl": _sum_within(mask, kl),
        "off_policy_masked": _sum_within(mask, is_off),
        "clipped_low": _sum_within(mask, low),
        "clipped_high": _sum_within(mask, high),
        "importance_clipped": _sum_within(mask, is_weight_clipped),
        **of_sampler,
    }
    return loss, sums, maxima


def _old_log_probs(log_probs: Tensor, batch: MicroBatch, objective: Objective) -> Tensor:
    """log pi_old; the policy's own on-policy, and outside the mask, so that exp() never overflows into 0 * inf."""
    if objective.old_is_sampler:  # as verl's bypass_mode and slime's use_rollout_logprobs
        log_ratios = log_importance_ratios(log_probs, batch.rollout_log_probs, batch.rollout_mask)
        return (log_probs - log_ratios).to(log_probs.dtype)
    if batch.old_log_probs is None:
        return log_probs
    return torch.where(batch.rollout_mask, batch.old_log_probs, log_probs)


def _against_sampler(
    log_probs: Tensor, log_weights: Tensor, batch: MicroBatch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums and maxima that compare the policy with the one that sampled, where that recorded a number."""
    comparable = batch.rollout_mask & batch.rollout_log_probs.isfinite()
    difference = torch.where(comparable, (log_probs - batch.rollout_log_probs).abs(), 0.0).double()
    sums = {
        "log_prob_diff": difference.sum(),
        "importance_ratio": _sum_within(comparable, log_weights.exp()),
        "importance_ratio_squared": _sum_within(comparable, (2 * log_weights).exp()),
        "non_finite_rollout_log_probs": _sum_within(batch.rollout_mask, ~comparable),
    }
    return sums, {"log_prob_diff": difference.max()}


def _weighted(
    loss: Tensor, log_ratios: Tensor, mask: Tensor, sequences: Sequences, correction: ImportanceCorrection | None
) -> tuple[Tensor, Tensor]:
    """The loss times its importance weights, and where the threshold changed one."""
    if correction is None:
        return loss, torch.zeros_like(mask)
    weights, is_clipped = importance_weights(log_ratios, mask, sequences, correction)
    return weights.to(loss.dtype) * loss, is_clipped


def _sum_within(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask, values.detach().double(), 0.0).sum()
