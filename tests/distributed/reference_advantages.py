"""Advantages and weights of expert tokens again, in plain Python: only their names are shared with chord_megatron."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from chord_megatron.config import ChordConfig, Config

Rewards = Sequence[float | None]


def total_rewards(by_function: Sequence[Rewards], config: Config) -> list[float | None]:
    """The weighted sums; None where one is missing."""
    weights = config.rewards.reward_weights or [1.0] * len(by_function)
    totals: list[float | None] = []
    for rewards in zip(*by_function):
        known = [weight * reward for weight, reward in zip(weights, rewards) if reward is not None]
        totals.append(sum(known) if len(known) == len(rewards) else None)
    return totals


def soft_overlong(lengths: Sequence[int], config: Config) -> list[float]:
    """As the paper of DAPO writes it, in three cases."""
    longest, cache = config.rollout.max_completion_length, config.rewards.soft_cache_length
    return [
        0.0 if length <= longest - cache else ((longest - cache) - length) / cache if length <= longest else -1.0
        for length in lengths
    ]


def advantages(totals: Rewards, by_function: Sequence[Rewards], lengths: Sequence[int], config: Config) -> list[float]:
    """Of the completions of one step, which is a generation batch."""
    grpo, size = config.grpo, config.rollout.num_generations
    eps = 1e-4 if config.chord.semantics == "ms-swift" else 1e-6
    if grpo.scale_rewards == "gdpo":
        weights = config.rewards.reward_weights or [1.0] * len(by_function)
        parts = [of_groups(rewards, size, 1e-8) for rewards in by_function]
        summed = [sum(weight * part for weight, part in zip(weights, row)) for row in zip(*parts)]
        mean, std = statistics.fmean(summed), statistics.stdev(summed)
        return [(value - mean) / (std + 1e-8) for value in summed]
    if grpo.advantage_estimator == "grpo":
        assert grpo.scale_rewards is None
        return of_groups(totals, size, eps)
    result = []
    for start in range(0, len(totals), size):
        group, tokens = totals[start : start + size], lengths[start : start + size]
        for place, reward in enumerate(group):
            others = [other for i, other in enumerate(group) if i != place]
            match grpo.advantage_estimator:
                case "rloo":
                    result.append((reward - statistics.fmean(others)) / (statistics.stdev(totals) + eps))
                case "opo":
                    result.append(reward - sum(r * n for r, n in zip(group, tokens)) / sum(tokens))
                case "pass_at_k":
                    result.append(max(0.0, reward - max(others)) / (statistics.stdev(group) + eps))
                case "reinforce_plus_plus":
                    result.append(reward - statistics.fmean(group))
    if grpo.advantage_estimator == "reinforce_plus_plus":
        return [value / (statistics.stdev(result) + eps) for value in result]
    return result


def of_groups(rewards: Rewards, size: int, eps: float) -> list[float]:
    """Less the mean of the group's rewards that are there, over their standard deviation."""
    result = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        known = [reward for reward in group if reward is not None]
        if len(set(known)) < 2:
            result += [0.0] * size
            continue
        mean, std = statistics.fmean(known), statistics.stdev(known)
        result += [0.0 if reward is None else (reward - mean) / (std + eps) for reward in group]
    return result


def expert_weights(log_probs: Tensor, entropy: Tensor, chord: ChordConfig) -> Tensor:
    """Of detached numbers, [tokens] each."""
    p = torch.exp(log_probs)
    name = "phi" if chord.chord_enable_phi_function else chord.expert_weight or "uniform"
    if name.endswith("own_weight.py:unsure"):
        return entropy / (1 + p)
    match name:
        case "uniform":
            return torch.ones_like(p)
        case "phi":
            weights = p * (1 - p)
            if chord.expert_weight_cutoff is not None:
                assert 0 < (p > chord.expert_weight_cutoff).sum() < len(p)
                weights[p > chord.expert_weight_cutoff] = 0.0
            return weights
        case "probability":
            return p
        case "luffy":
            return chord.luffy_gamma * p / (p + chord.luffy_gamma) ** 2
        case "entropy":
            return torch.exp(-entropy) / 2
    raise AssertionError(name)
