"""The objective that a configuration asks for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from chord_megatron.algorithm.aggregation import Mean
from chord_megatron.algorithm.expert_weights import EXPERT_WEIGHTS, ExpertWeight
from chord_megatron.algorithm.importance import ImportanceCorrection
from chord_megatron.algorithm.objective import KLPenalty, Objective
from chord_megatron.algorithm.policy_losses import (
    KL_ESTIMATORS,
    LOSS_TYPES,
    RATIO_LEVELS,
    PolicyLoss,
    parameters_of,
)
from chord_megatron.algorithm.presets import SEMANTICS, Semantics
from chord_megatron.config import ChordConfig, Config, GRPOConfig
from chord_megatron.planning.experts import expert_weight_name
from chord_megatron.planning.plan import Plan
from chord_megatron.system.user_functions import is_user_function
from chord_megatron.training.user_losses import load_expert_weight, load_policy_loss


def build_objective(grpo: GRPOConfig, chord: ChordConfig) -> Objective:
    """Everything but mu and the mean of the rollout stream, which the batch's weights hold.

    Raises UserError where a function of the user's cannot be used.
    """
    semantics = SEMANTICS[chord.semantics]
    return Objective(
        policy_loss=_policy_loss(grpo, semantics),
        ratio_level=RATIO_LEVELS[grpo.importance_sampling_level],
        expert_weight=_expert_weight(chord),
        beta=grpo.beta,
        kl_estimator=_kl_estimator(grpo, semantics),
        kl_in_reward=grpo.kl_in_reward,
        entropy_coef=grpo.entropy_coef,
        importance=_importance(grpo, semantics),
        log_ratio_bound=semantics.log_ratio_bound,
        weighs_kl=semantics.weighs_kl,
        off_policy_delta=grpo.off_policy_sequence_mask_delta,
        old_is_sampler=grpo.old_log_probs == "sampler",
        is_scaled_by_advantage=grpo.policy_loss is None,
    )


def build_means(config: Config, plan: Plan) -> tuple[Mean, Mean]:
    """The means of the rollout and of the expert stream, as chord.semantics takes them."""
    semantics, size = SEMANTICS[config.chord.semantics], config.train.micro_batch_size
    rollout = Mean(LOSS_TYPES[config.grpo.loss_type].aggregation, config.rollout.max_completion_length)
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
        return load_expert_weight(name)
    bound: dict[str, dict[str, Any]] = {
        "phi": {"cutoff": chord.expert_weight_cutoff},
        "luffy": {"gamma": chord.luffy_gamma},
    }
    return partial(EXPERT_WEIGHTS[name], **bound.get(name, {}))


def _kl_estimator(grpo: GRPOConfig, semantics: Semantics) -> KLPenalty:
    estimator, bound = KL_ESTIMATORS[grpo.kl_estimator], semantics.kl_bound
    if bound is None:
        return estimator
    return lambda log_probs, ref_log_probs: estimator(log_probs, ref_log_probs).clamp(-bound, bound)


def _importance(grpo: GRPOConfig, semantics: Semantics) -> ImportanceCorrection | None:
    mode, threshold = grpo.rollout_importance_sampling_mode, grpo.rollout_importance_sampling_threshold
    return None if mode is None else ImportanceCorrection(mode, threshold, semantics.sequence_ratio)


def _policy_loss(grpo: GRPOConfig, semantics: Semantics) -> PolicyLoss:
    if grpo.policy_loss is not None:
        return load_policy_loss(grpo.policy_loss)
    surrogate = LOSS_TYPES[grpo.loss_type].surrogate
    values = {key: getattr(grpo, key) for key in parameters_of(surrogate)}
    if "epsilon_high" in values and grpo.epsilon_high is None:
        values["epsilon_high"] = grpo.epsilon
    if "delta" in values and grpo.delta is None:
        values["delta"] = semantics.delta
    return partial(surrogate, **values)
