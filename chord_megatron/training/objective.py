"""The objective that a configuration asks for."""

from __future__ import annotations

from functools import partial

from chord_megatron.algorithm.aggregation import Aggregation, Mean
from chord_megatron.algorithm.expert_weights import phi, uniform
from chord_megatron.algorithm.importance import ImportanceCorrection
from chord_megatron.algorithm.objective import Objective
from chord_megatron.algorithm.policy_losses import clipped_policy_loss
from chord_megatron.config import ChordConfig, Config, GRPOConfig

AGGREGATIONS: dict[str, Aggregation] = {"dapo": "token_mean", "grpo": "sequence_mean", "dr_grpo": "fixed_length"}


def build_objective(grpo: GRPOConfig, chord: ChordConfig) -> Objective:
    """Everything but mu and the mean of the rollout stream, which the batch's weights hold."""
    mode = grpo.rollout_importance_sampling_mode
    return Objective(
        policy_loss=partial(
            clipped_policy_loss,
            epsilon=grpo.epsilon,
            epsilon_high=grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high,
        ),
        expert_weight=phi if chord.chord_enable_phi_function else uniform,
        beta=grpo.beta,
        importance=None if mode is None else ImportanceCorrection(mode, grpo.rollout_importance_sampling_threshold),
    )


def rollout_mean(config: Config) -> Mean:
    """The mean of the rollout stream that grpo.loss_type names."""
    return Mean(AGGREGATIONS[config.grpo.loss_type], config.rollout.max_completion_length)
