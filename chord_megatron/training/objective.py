"""The objective that a configuration asks for."""

from __future__ import annotations

from functools import partial

from chord_megatron.algorithm.aggregation import Mean
from chord_megatron.algorithm.expert_weights import phi, uniform
from chord_megatron.algorithm.importance import ImportanceCorrection
from chord_megatron.algorithm.objective import Objective
from chord_megatron.algorithm.policy_losses import (
    KL_ESTIMATORS,
    LOSS_TYPES,
    RATIO_LEVELS,
    PolicyLoss,
    parameters_of,
)
from chord_megatron.config import ChordConfig, Config, GRPOConfig
from chord_megatron.training.user_policy_loss import load_policy_loss


def build_objective(grpo: GRPOConfig, chord: ChordConfig) -> Objective:
    """Everything but mu and the mean of the rollout stream, which the batch's weights hold.

    Raises UserError where a policy loss of the user's cannot be used.
    """
    mode = grpo.rollout_importance_sampling_mode
    return Objective(
        policy_loss=_policy_loss(grpo),
        ratio_level=RATIO_LEVELS[grpo.importance_sampling_level],
        expert_weight=phi if chord.chord_enable_phi_function else uniform,
        beta=grpo.beta,
        kl_estimator=KL_ESTIMATORS[grpo.kl_estimator],
        kl_in_reward=grpo.kl_in_reward,
        entropy_coef=grpo.entropy_coef,
        importance=None if mode is None else ImportanceCorrection(mode, grpo.rollout_importance_sampling_threshold),
        off_policy_delta=grpo.off_policy_sequence_mask_delta,
    )


def rollout_mean(config: Config) -> Mean:
    """The mean of the rollout stream that grpo.loss_type names."""
    return Mean(LOSS_TYPES[config.grpo.loss_type].aggregation, config.rollout.max_completion_length)


def _policy_loss(grpo: GRPOConfig) -> PolicyLoss:
    if grpo.policy_loss is not None:
        return load_policy_loss(grpo.policy_loss)
    surrogate = LOSS_TYPES[grpo.loss_type].surrogate
    values = {key: getattr(grpo, key) for key in parameters_of(surrogate)}
    if "epsilon_high" in values and grpo.epsilon_high is None:
        values["epsilon_high"] = grpo.epsilon
    return partial(surrogate, **values)
