"""Rules of what makes an advantage: the reward functions' lengths, and what rewards are divided by."""

from __future__ import annotations

from typing import Any

from chord_megatron.algorithm.advantages import ESTIMATORS, Scale
from chord_megatron.config import Config, GRPOConfig
from chord_megatron.planning.schedule import needs_rollouts
from chord_megatron.planning.unread import refuse_unread
from chord_megatron.system.errors import UserError


def check_rewards(config: Config) -> None:
    """That estimator and scale go together, and `soft_overlong` has what it needs. Raises UserError."""
    grpo, rewards = config.grpo, config.rewards
    scales = ESTIMATORS[grpo.advantage_estimator].scales
    if reward_scale(grpo) not in scales:
        raise UserError(
            f"grpo.scale_rewards={grpo.scale_rewards} makes no sense with grpo.advantage_estimator="
            f"{grpo.advantage_estimator}; set it to {' or '.join(scales)}"
        )
    if grpo.kl_in_reward and reward_scale(grpo) == "gdpo":
        raise UserError(
            "grpo.scale_rewards=gdpo normalises each function's rewards, and grpo.kl_in_reward=true takes the penalty "
            "from their sum; set one of them otherwise"
        )
    if "accuracy" not in rewards.reward_funcs:
        refuse_unread("rewards", rewards, ["answer_format"], "rewards.reward_funcs without accuracy")
    if "soft_overlong" not in rewards.reward_funcs:
        keys = ("soft_cache_length", "soft_max_length")
        refuse_unread("rewards", rewards, keys, "rewards.reward_funcs without soft_overlong")
        return
    if rewards.soft_cache_length is None:
        raise UserError(
            "rewards.reward_funcs names soft_overlong, which needs rewards.soft_cache_length, the tokens over which it "
            "grows; set it"
        )
    longest = soft_max_length(config)
    if rewards.soft_cache_length > longest:
        key = "rollout.max_completion_length" if rewards.soft_max_length is None else "rewards.soft_max_length"
        raise UserError(f"rewards.soft_cache_length={rewards.soft_cache_length} is above {key}={longest}; lower it")


def reward_scale(grpo: GRPOConfig) -> Scale:
    """What advantages are divided by: as configured, or as is usual with the estimator."""
    return grpo.scale_rewards or ESTIMATORS[grpo.advantage_estimator].scales[0]


def soft_max_length(config: Config) -> int:
    """Tokens at which `soft_overlong` is -1."""
    configured = config.rewards.soft_max_length
    return config.rollout.max_completion_length if configured is None else configured


def reward_settings(config: Config) -> dict[str, Any]:
    """The group `rewards` with what other groups say of it; without functions where nothing is scored."""
    unused: dict[str, Any] = {} if scores_completions(config) else {"reward_funcs": [], "reward_weights": None}
    return {**config.rewards.model_dump(), "soft_max_length": soft_max_length(config), **unused}


def scores_completions(config: Config) -> bool:
    """Whether there are any, of steps or of evaluations."""
    return needs_rollouts(config) or config.train.eval_steps is not None
