"""Losses of the policy's own tokens: the surrogate, the level of its ratio, its mean, and the penalty of the reference.

A policy loss is a function `PolicyTokens -> TokenLoss`; what it needs beside the tokens, such as epsilon, is a keyword
argument, named as its configuration key and bound where the objective is built. `LOSS_TYPES` is the table of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from chord_megatron.algorithm.aggregation import Aggregation
from chord_megatron.algorithm.sequences import Sequences

LossType = Literal["grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo", "sapo", "vespo", "gpg", "gmpo"]
ImportanceSamplingLevel = Literal["token", "sequence", "sequence_token"]
KLEstimator = Literal["k1", "k2", "k3"]


class PolicyTokens(NamedTuple):
    """What a policy loss sees, [tokens] each. Outside `mask` log-ratio and advantage are 0, the loss does not count."""

    log_probs: Tensor  # of the policy, with gradient
    log_ratios: Tensor  # log(pi / pi_old) at the level of the objective, with gradient
    advantages: Tensor
    mask: Tensor  # bool
    sequences: Sequences  # of these tokens, for quantities of whole completions


class TokenLoss(NamedTuple):
    """What a policy loss returns, [tokens] each. A loss without bounds leaves the other two out."""

    loss: Tensor
    is_clipped_low: Tensor | None = None  # bool: the lower bound of the ratio holds the loss
    is_clipped_high: Tensor | None = None  # bool: an upper bound does; never both


PolicyLoss = Callable[[PolicyTokens], TokenLoss]


# --- the level of the ratio -----------------------------------------------------------------------------------------

# (log_probs, old_log_probs, mask, sequences) -> log_ratios, 0 and without gradient outside the mask
RatioLevel = Callable[[Tensor, Tensor, Tensor, Sequences], Tensor]


def token_log_ratios(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, sequences: Sequences) -> Tensor:
    """log(pi / pi_old) of each token by itself."""
    return torch.where(mask, log_probs - old_log_probs, 0.0)


def sequence_log_ratios(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, sequences: Sequences) -> Tensor:
    """log s, the mean of the tokens' log-ratios over their sequence (GSPO, arXiv 2507.18071, eq. 7)."""
    log_ratios = token_log_ratios(log_probs, old_log_probs, mask, sequences)
    # float64: thousands of terms that nearly cancel, against bounds of 3e-4.
    means = sequences.mean(log_ratios.double(), mask).to(log_probs.dtype)
    return torch.where(mask, means, 0.0)


def sequence_token_log_ratios(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, sequences: Sequences) -> Tensor:
    """log s without gradient, and with the gradient of the token's own log-prob (GSPO-token, eq. 14)."""
    log_s = sequence_log_ratios(log_probs.detach(), old_log_probs, mask, sequences)
    return log_s + torch.where(mask, log_probs - log_probs.detach(), 0.0)


RATIO_LEVELS: dict[ImportanceSamplingLevel, RatioLevel] = {
    "token": token_log_ratios,
    "sequence": sequence_log_ratios,
    "sequence_token": sequence_token_log_ratios,
}


# --- surrogates -----------------------------------------------------------------------------------------------------


def clipped_policy_loss(
    tokens: PolicyTokens, *, epsilon: float, epsilon_high: float, delta: float | None = None
) -> TokenLoss:
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) (PPO, arXiv 1707.06347, eq. 7; DAPO's two bounds).

    delta, above 1 + epsilon_high, bounds the rho that the clip leaves free, where A < 0 (INTELLECT-2, arXiv 2505.07291;
    `delta` of TRL and ms-swift): the loss is then at most -delta A, the dual clip of arXiv 1912.09729.
    """
    ratio, advantages = torch.exp(tokens.log_ratios), tokens.advantages
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    bounded_ratio = ratio if delta is None else ratio.clamp(max=delta)
    surrogate, clipped = bounded_ratio * advantages, clipped_ratio * advantages
    is_clipped = clipped < surrogate
    is_high = is_clipped & (advantages > 0)
    if delta is not None:
        is_high = is_high | ((advantages < 0) & (ratio > delta))
    return TokenLoss(-torch.min(surrogate, clipped), is_clipped & (advantages < 0), is_high)


def cispo_policy_loss(tokens: PolicyTokens, *, epsilon_high: float) -> TokenLoss:
    """-sg(min(rho, epsilon_high)) A log pi (CISPO, arXiv 2506.13585): no token loses its gradient.

    epsilon_high is the cap itself, as in TRL and ms-swift; no lower bound, as there.
    """
    ratio = torch.exp(tokens.log_ratios.detach())
    loss = -ratio.clamp(max=epsilon_high) * tokens.advantages * tokens.log_probs
    return TokenLoss(loss, is_clipped_high=(ratio > epsilon_high) & (tokens.advantages != 0))


def sapo_policy_loss(tokens: PolicyTokens, *, tau_pos: float, tau_neg: float) -> TokenLoss:
    """-A sigmoid(tau (rho - 1)) 4 / tau, with tau_pos where A > 0: a soft gate for the clip (SAPO, arXiv 2511.20347).

    Its slope at rho = 1 is that of -rho A.
    """
    excess = torch.exp(tokens.log_ratios) - 1
    good, bad = (torch.sigmoid(tau * excess) * (4 / tau) for tau in (tau_pos, tau_neg))
    return TokenLoss(-torch.where(tokens.advantages > 0, good, bad) * tokens.advantages)


def gpg_policy_loss(tokens: PolicyTokens) -> TokenLoss:
    """-A log pi: the policy gradient itself (GPG, arXiv 2504.02546)."""
    return TokenLoss(-tokens.advantages * tokens.log_probs)


def gmpo_policy_loss(tokens: PolicyTokens, *, epsilon: float, epsilon_high: float) -> TokenLoss:
    """-A exp(mean of the bounded log-ratios of the sequence), the same for its tokens (GMPO, arXiv 2507.20673, eq. 4).

    The bounds are those of the log-ratio, [-epsilon, epsilon_high], as in verl; one-sided by the sign of A, as PPO's.
    """
    log_ratios, sign = tokens.log_ratios, tokens.advantages.sign()
    held = sign * torch.min(sign * log_ratios, sign * log_ratios.clamp(-epsilon, epsilon_high))
    ratio = torch.exp(tokens.sequences.mean(held, tokens.mask))
    loss = -tokens.sequences.mean(tokens.advantages, tokens.mask) * ratio
    return TokenLoss(loss, (log_ratios < -epsilon) & (sign < 0), (log_ratios > epsilon_high) & (sign > 0))


def vespo_policy_loss(
    tokens: PolicyTokens,
    *,
    vespo_k_pos: float,
    vespo_lambda_pos: float,
    vespo_k_neg: float,
    vespo_lambda_neg: float,
) -> TokenLoss:
    """-sg(exp(lambda + k log w - lambda w)) A log pi, w = pi / pi_old of the whole sequence (VESPO, arXiv 2602.10693).

    1 at w = 1. k and lambda by the sign of A; bounds of the logarithms as in TRL's `get_gamma_weights`.
    """
    log_w = tokens.sequences.sum(tokens.log_ratios.detach().double().clamp(-20, 20)).clamp(math.log(1e-8), 20)
    good, bad = (
        torch.exp(decay + k * log_w - decay * torch.exp(log_w))
        for k, decay in ((vespo_k_pos, vespo_lambda_pos), (vespo_k_neg, vespo_lambda_neg))
    )
    weight = torch.where(tokens.advantages >= 0, good, bad).to(tokens.log_probs.dtype)
    return TokenLoss(-weight * tokens.advantages * tokens.log_probs)


class PolicyObjective(NamedTuple):
    """What a loss type stands for."""

    surrogate: Callable[..., TokenLoss]
    aggregation: Aggregation
    levels: tuple[ImportanceSamplingLevel, ...] = ("token", "sequence", "sequence_token")  # that make sense with it


LOSS_TYPES: dict[LossType, PolicyObjective] = {
    "grpo": PolicyObjective(clipped_policy_loss, "sequence_mean"),
    "bnpo": PolicyObjective(clipped_policy_loss, "token_mean"),
    "dapo": PolicyObjective(clipped_policy_loss, "token_mean"),
    "dr_grpo": PolicyObjective(clipped_policy_loss, "fixed_length"),
    # The loss of a sequence times its length (arXiv 2602.05261) is the sum over its tokens.
    "luspo": PolicyObjective(clipped_policy_loss, "sequence_sum", ("sequence", "sequence_token")),
    "cispo": PolicyObjective(cispo_policy_loss, "token_mean"),
    "sapo": PolicyObjective(sapo_policy_loss, "sequence_mean"),
    "vespo": PolicyObjective(vespo_policy_loss, "token_mean", ("token",)),
    "gpg": PolicyObjective(gpg_policy_loss, "token_mean", ("token",)),
    "gmpo": PolicyObjective(gmpo_policy_loss, "sequence_mean", ("token",)),
}


def parameters_of(surrogate: Callable[..., TokenLoss]) -> tuple[str, ...]:
    """The configuration keys that a surrogate reads."""
    parameters = inspect.signature(surrogate).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


# --- the penalty of the reference -----------------------------------------------------------------------------------


def _k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    return log_probs - ref_log_probs


def _k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    return (log_probs - ref_log_probs).square() / 2


def _k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    difference = ref_log_probs - log_probs
    return torch.expm1(difference) - difference


# Schulman's estimates of KL(pi || ref) of each token: (log_probs, ref_log_probs) -> [tokens]. k1 has no gradient on
# average, that of k2 is the gradient of the divergence; k3 = e^d - d - 1, d = ref - log_prob, is never negative.
KL_ESTIMATORS: dict[KLEstimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}
