"""Rules of the policy loss: every key that is set is one that the loss reads, and means what it says."""

from __future__ import annotations

from chord_megatron.algorithm.policy_losses import LOSS_TYPES, parameters_of
from chord_megatron.config import GRPOConfig
from chord_megatron.planning.unread import refuse_unread
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import shown
from chord_megatron.system.user_functions import is_user_function


def check_objective(grpo: GRPOConfig) -> None:
    """Raises UserError."""
    if grpo.policy_loss is not None and not is_user_function(grpo.policy_loss):
        raise UserError(f"grpo.policy_loss={shown(grpo.policy_loss)} must look like path.py:function")
    _check_what_is_read(grpo)
    if grpo.policy_loss is None:
        _check_level(grpo)
        _check_bounds(grpo)
    _check_penalty(grpo)
    if grpo.old_log_probs == "sampler" and grpo.rollout_importance_sampling_mode is not None:
        raise UserError(
            "grpo.old_log_probs=sampler takes the ratio against the sampler itself, which leaves "
            f"grpo.rollout_importance_sampling_mode={grpo.rollout_importance_sampling_mode} nothing to correct; remove "
            "one of them"
        )


def _check_what_is_read(grpo: GRPOConfig) -> None:
    read: tuple[str, ...] = ()
    reader = f"grpo.policy_loss={grpo.policy_loss}"
    if grpo.policy_loss is None:
        read, reader = parameters_of(LOSS_TYPES[grpo.loss_type].surrogate), f"grpo.loss_type={grpo.loss_type}"
    parameters = dict.fromkeys(key for row in LOSS_TYPES.values() for key in parameters_of(row.surrogate))
    refuse_unread("grpo", grpo, (key for key in parameters if key not in read), reader)
    if not grpo.overlong_filter:
        refuse_unread("grpo", grpo, ["filtered_count"], "grpo.overlong_filter=false")
    if grpo.rollout_importance_sampling_mode is None:
        key = "rollout_importance_sampling_threshold"
        refuse_unread("grpo", grpo, [key], "grpo.rollout_importance_sampling_mode=null")


def _check_level(grpo: GRPOConfig) -> None:
    level, levels = grpo.importance_sampling_level, LOSS_TYPES[grpo.loss_type].levels
    if level not in levels:
        raise UserError(
            f"grpo.loss_type={grpo.loss_type} does not go with grpo.importance_sampling_level={level}; set that to "
            f"{' or '.join(levels)}"
        )


def _check_bounds(grpo: GRPOConfig) -> None:
    high = grpo.epsilon_high
    if grpo.loss_type == "cispo" and (high is None or high <= 1):
        raise UserError(
            f"grpo.loss_type=cispo takes grpo.epsilon_high, now {'null' if high is None else high}, as the largest "
            "ratio itself; set it above 1, such as 5.0"
        )
    bound = 1 + (grpo.epsilon if high is None else high)
    if grpo.delta is not None and grpo.delta <= bound:
        raise UserError(
            f"grpo.delta={grpo.delta} bounds ratios beyond the clip range and must be above 1 + grpo.epsilon_high = "
            f"{bound:g}; raise it, or set it to null"
        )


def _check_penalty(grpo: GRPOConfig) -> None:
    if grpo.kl_in_reward and not grpo.beta:
        raise UserError("grpo.kl_in_reward=true needs grpo.beta above 0; set it, or remove grpo.kl_in_reward")
    if grpo.kl_estimator != "k3" and (grpo.kl_in_reward or not grpo.beta):
        raise UserError(
            f"grpo.kl_estimator={grpo.kl_estimator} is for the KL penalty in the loss, which needs grpo.beta above 0 "
            "and grpo.kl_in_reward=false; remove it"
        )
