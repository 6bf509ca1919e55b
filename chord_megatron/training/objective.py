"""The objective that a configuration asks for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from chord_megatron.algorithm.aggregation import Aggregation, Mean
from chord_megatron.algorithm.expert_weights import EXPERT_WEIGHTS, ExpertWeight, checked
from chord_megatron.algorithm.importance import ImportanceCorrection
from chord_megatron.algorithm.objective import Objective
from chord_megatron.algorithm.policy_losses import clipped_policy_loss
from chord_megatron.algorithm.presets import SEMANTICS
from chord_megatron.config import ChordConfig, Config, GRPOConfig
from chord_megatron.planning.experts import expert_weight_name
from chord_megatron.planning.plan import Plan
from chord_megatron.system.user_functions import is_user_function, load_user_function

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
        expert_weight=_expert_weight(chord),
        beta=grpo.beta,
        importance=None if mode is None else ImportanceCorrection(mode, grpo.rollout_importance_sampling_threshold),
    )


def build_means(config: Config, plan: Plan) -> tuple[Mean, Mean]:
    """The means of the rollout and of the expert stream, as chord.semantics takes them."""
    semantics, size = SEMANTICS[config.chord.semantics], config.train.micro_batch_size
    rollout = Mean(AGGREGATIONS[config.grpo.loss_type], config.rollout.max_completion_length)
    if semantics.micro_batches is None:
        return rollout, Mean()
    by_rows = semantics.micro_batches == "rows"
    num_micro_batches = plan.completions_per_step // size
    if config.grpo.loss_type in semantics.divided_by_accumulation:
        rollout = replace(rollout, scale=plan.data_parallel_size / num_micro_batches)
    else:
        rollout = replace(rollout, rows=size, by_rows=by_rows)
    return rollout, Mean(rows=size if by_rows else plan.expert_rows_per_step // num_micro_batches, by_rows=by_rows)


def _expert_weight(chord: ChordConfig) -> ExpertWeight:
    name = expert_weight_name(chord)
    if is_user_function(name):
        return checked(name, load_user_function("chord.expert_weight", name, arguments=2))
    bound: dict[str, dict[str, Any]] = {
        "phi": {"cutoff": chord.expert_weight_cutoff},
        "luffy": {"gamma": chord.luffy_gamma},
    }
    return partial(EXPERT_WEIGHTS[name], **bound.get(name, {}))
