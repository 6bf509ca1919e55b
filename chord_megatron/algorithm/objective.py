"""The CHORD objective, token by token. Tensors and numbers in, a weighted sum and metric sums out.

    L = (1 - mu) * sum_R a_t * l_t  +  mu * sum_E b_t * w_t * (-log pi(y*_t))

The weights a_t and b_t carry their global denominators, so the loss of an optimizer step is the plain sum
of these results over its micro-batches and ranks.
"""

import torch
from torch import Tensor

from chord_megatron.algorithm.importance import ImportanceSamplingMode, importance_weights, log_importance_ratios
from chord_megatron.types import MicroBatch

# What `chord_loss` sums over tokens, in this order; every rank and micro-batch returns the same names.
METRIC_SUMS = (
    "loss_rollout",
    "loss_expert",
    "entropy",
    "kl",
    "clipped",
    "phi",
    "log_prob_diff",
    "importance_ratio",
    "importance_ratio_squared",
    "importance_clipped",
)


def clipped_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of each token and whether the clip holds it. All tensors [tokens].

    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) with rho = exp(log_probs - old_log_probs).
    """
    ratio = torch.exp(log_probs - old_log_probs)
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    loss = -torch.min(ratio * advantages, clipped_ratio * advantages)
    is_clipped = (clipped_ratio * advantages) < (ratio * advantages)
    return loss, is_clipped


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """The non-negative estimate e^d - d - 1 of KL(pi || ref), d = ref - log_prob, [tokens] (Schulman's k3)."""
    difference = ref_log_probs - log_probs
    return torch.expm1(difference) - difference


def phi(log_probs: Tensor) -> Tensor:
    """The CHORD-phi weight p (1 - p) of each expert token, detached, [tokens].

    `-exp(lp) * expm1(lp)` keeps its digits where p is close to 1.
    """
    log_probs = log_probs.detach()
    return -torch.exp(log_probs) * torch.expm1(log_probs)


def chord_loss(
    log_probs: Tensor,
    entropy: Tensor,
    batch: MicroBatch,
    *,
    mu: float,
    epsilon: float,
    epsilon_high: float,
    beta: float,
    use_phi: bool,
    rollout_importance_sampling_mode: ImportanceSamplingMode | None = None,
    rollout_importance_sampling_threshold: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CHORD loss of one packed micro-batch.

    log_probs, entropy: [tokens], of each position's label, at the token's own temperature.
    Returns the loss (a scalar attached to the graph even where both streams are empty), the sums named by
    METRIC_SUMS ([10] float64) and the largest |trainer - sampler| log-prob difference (scalar float64).
    """
    is_rollout, is_expert = batch.rollout_weights > 0, batch.expert_weights > 0
    detached = log_probs.detach()
    # Outside its mask a stream sees its own log-probs, so that exp() never overflows into 0 * inf.
    old_log_probs = detached if batch.old_log_probs is None else _within(is_rollout, batch.old_log_probs, detached)
    policy_loss, is_clipped = clipped_policy_loss(
        log_probs, old_log_probs, batch.advantages, epsilon=epsilon, epsilon_high=epsilon_high
    )
    log_ratios = log_importance_ratios(old_log_probs, batch.rollout_log_probs, is_rollout)
    policy_loss, is_weight_clipped = _weighted(
        policy_loss,
        log_ratios,
        is_rollout,
        batch.cu_seqlens,
        rollout_importance_sampling_mode,
        rollout_importance_sampling_threshold,
    )
    kl = torch.zeros_like(detached)
    if batch.ref_log_probs is not None:
        kl = kl_penalty(log_probs, _within(is_rollout, batch.ref_log_probs, detached))
        policy_loss = policy_loss + beta * kl
    phi_weights = phi(log_probs)
    expert_loss = -log_probs * (phi_weights if use_phi else 1.0)

    # float64 sums: their rounding must not depend on how the step was cut into micro-batches.
    loss_rollout = (batch.rollout_weights * policy_loss).sum(dtype=torch.float64)
    loss_expert = (batch.expert_weights * expert_loss).sum(dtype=torch.float64)
    loss = (1 - mu) * loss_rollout + mu * loss_expert

    sampler_difference = torch.where(is_rollout, (detached - batch.rollout_log_probs).abs(), 0.0).double()
    sums = torch.stack(
        [
            loss_rollout.detach(),
            loss_expert.detach(),
            _masked_sum(entropy, is_rollout),
            _masked_sum(kl, is_rollout),
            _masked_sum(is_clipped, is_rollout),
            _masked_sum(phi_weights, is_expert),
            sampler_difference.sum(),
            _masked_sum(log_ratios.exp(), is_rollout),
            _masked_sum((2 * log_ratios).exp(), is_rollout),
            _masked_sum(is_weight_clipped, is_rollout),
        ]
    )
    return loss, sums, sampler_difference.max()


def _weighted(
    policy_loss: Tensor,
    log_ratios: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    mode: ImportanceSamplingMode | None,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """The policy loss times its importance weights, and where the threshold changed one; the same loss without a mode.

    Not for the KL penalty: a masked token must still be held near the reference (as in TRL, NeMo-RL, Megatron-SWIFT).
    """
    if mode is None:
        return policy_loss, torch.zeros_like(mask)
    weights, is_clipped = importance_weights(log_ratios, mask, cu_seqlens, mode=mode, threshold=threshold)
    return weights.to(policy_loss.dtype) * policy_loss, is_clipped


def _within(mask: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    return torch.where(mask, inside, outside)


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values.detach().double(), 0.0).sum()
