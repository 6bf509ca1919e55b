"""The advantages that a configuration asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from chord_megatron.algorithm.advantages import gdpo_advantages, group_advantages
from chord_megatron.algorithm.presets import SEMANTICS
from chord_megatron.config import Config
from chord_megatron.planning.rewards import reward_scale
from chord_megatron.types import ScoredRollouts


def advantages_of(scored: ScoredRollouts, config: Config) -> Tensor:
    """[completions] float64, of a whole generation batch, the same on every rank."""
    rewards = torch.tensor(scored.rewards, dtype=torch.float64)
    num_generations, scale = config.rollout.num_generations, reward_scale(config.grpo)
    if scale == "gdpo":
        weights = config.rewards.reward_weights or [1.0] * len(config.rewards.reward_funcs)
        rows = [scored.rewards_by_function[name] for name in config.rewards.reward_funcs]
        by_function = torch.tensor(rows, dtype=torch.float64).where(~rewards.isnan(), torch.nan)
        return gdpo_advantages(by_function, weights, num_generations)
    return group_advantages(
        rewards,
        num_generations,
        estimator=config.grpo.advantage_estimator,
        scale=scale,
        lengths=torch.tensor([float(rollout.response_mask.sum()) for rollout in scored.rollouts]),
        eps=SEMANTICS[config.chord.semantics].advantage_eps,
    )
