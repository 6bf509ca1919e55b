"""The policy losses again, one completion at a time, from the papers' formulas: what `reference.py` trains with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from chord_megatron.config import GRPOConfig

GROWS_WITH_TOKENS = ("dapo", "bnpo", "cispo", "gpg", "vespo")  # means over the tokens of the step
MEANS_OF_SEQUENCES = ("grpo", "sapo", "gmpo")


def token_losses(log_probs: Tensor, old: Tensor, advantages: Tensor, grpo: GRPOConfig) -> Tensor:
    """The loss of each token of a completion, [targets] float64."""
    ratio = ratios(log_probs, old, grpo.importance_sampling_level)
    low, high = 1 - grpo.epsilon, 1 + (grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high)
    match grpo.loss_type:
        case "gpg":
            return -advantages * log_probs
        case "cispo":
            assert grpo.epsilon_high is not None
            return -torch.clip(ratio, max=grpo.epsilon_high).detach() * advantages * log_probs
        case "sapo":
            tau = torch.where(advantages > 0, torch.tensor(grpo.tau_pos).double(), torch.tensor(grpo.tau_neg).double())
            return -advantages * 4 / tau / (1 + torch.exp(-tau * (ratio - 1)))
        case "vespo":
            w = torch.exp((log_probs - old).sum()).item()
            is_good = bool(advantages[0] >= 0)
            k, decay = (
                (grpo.vespo_k_pos, grpo.vespo_lambda_pos) if is_good else (grpo.vespo_k_neg, grpo.vespo_lambda_neg)
            )
            return -(w**k) * math.exp(decay - decay * w) * advantages * log_probs
        case "gmpo":
            bounded = torch.clip(ratio, math.exp(low - 1), math.exp(high - 1))
            held = torch.where(advantages > 0, torch.minimum(ratio, bounded), torch.maximum(ratio, bounded))
            return -advantages * torch.prod(held) ** (1 / len(held))
    free = ratio if grpo.delta is None else torch.clip(ratio, max=grpo.delta)
    return -torch.minimum(free * advantages, torch.clip(ratio, low, high) * advantages)


def ratios(log_probs: Tensor, old: Tensor, level: str) -> Tensor:
    """pi / pi_old of each token."""
    if level == "token":
        return torch.exp(log_probs - old)
    geometric = torch.exp((log_probs - old).sum() / len(old))
    if level == "sequence":
        return geometric.expand(len(old))
    return geometric.detach() * torch.exp(log_probs - log_probs.detach())


def kl(log_probs: Tensor, ref: Tensor, estimator: str) -> Tensor:
    """Of each token."""
    d = ref - log_probs
    return {"k1": -d, "k2": d**2 / 2, "k3": torch.exp(d) - d - 1}[estimator]


def mean(losses: list[Tensor], loss_type: str, max_length: int) -> Tensor:
    """Of the losses of each completion's tokens."""
    sums, lengths = [loss.sum() for loss in losses], [len(loss) for loss in losses]
    if loss_type in GROWS_WITH_TOKENS:
        return sum(sums) / sum(lengths)
    if loss_type in MEANS_OF_SEQUENCES:
        return sum(total / length for total, length in zip(sums, lengths)) / len(losses)
    assert loss_type in ("dr_grpo", "luspo")
    return sum(sums) / (len(losses) * (max_length if loss_type == "dr_grpo" else 1))
