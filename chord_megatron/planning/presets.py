"""Rules of `chord.semantics`: what a preset needs, and what it costs."""

from __future__ import annotations

from chord_megatron.algorithm.policy_losses import LOSS_TYPES, parameters_of
from chord_megatron.algorithm.presets import SEMANTICS, Semantics
from chord_megatron.config import Config, GRPOConfig
from chord_megatron.system.errors import UserError


def check_preset(config: Config, expert_rows_per_step: int) -> None:
    """That the preset's micro-batches exist, and its bounds fit the configuration's. Raises UserError."""
    chord, grpo, train = config.chord, config.grpo, config.train
    semantics, key = SEMANTICS[chord.semantics], f"chord.semantics={chord.semantics}"
    num_micro_batches = (train.global_batch_size or 0) // train.micro_batch_size
    if semantics.micro_batches == "equal" and expert_rows_per_step % num_micro_batches:
        raise UserError(
            f"{key} draws as many expert rows for each of the {num_micro_batches} micro-batches of a step, but a step "
            f"has {expert_rows_per_step}; set chord.chord_sft_per_device_train_batch_size, or a multiple of "
            f"{num_micro_batches} as chord.chord_sft_global_batch_size"
        )
    if grpo.loss_type in semantics.divided_by_accumulation and grpo.steps_per_generation > 1:
        raise UserError(
            f"{key} counts the tokens of a whole generation batch for grpo.loss_type={grpo.loss_type}, which is not "
            "built; set grpo.steps_per_generation=1, or another grpo.loss_type"
        )
    _check_dual_clip(key, semantics, grpo)


def _check_dual_clip(key: str, semantics: Semantics, grpo: GRPOConfig) -> None:
    """As `grpo.delta` is checked where it is set."""
    reads_delta = grpo.policy_loss is None and "delta" in parameters_of(LOSS_TYPES[grpo.loss_type].surrogate)
    if semantics.delta is None or grpo.delta is not None or not reads_delta:
        return
    bound = 1 + (grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high)
    if semantics.delta <= bound:
        raise UserError(
            f"{key} clips ratios at {semantics.delta:g} where grpo.delta is null, but 1 + grpo.epsilon_high = "
            f"{bound:g} is not below that; lower grpo.epsilon_high, or set grpo.delta above"
        )


def keeps_filtered(config: Config) -> bool:
    """Whether completions that are filtered out count in the denominators. ms-swift's `bnpo` drops them as well."""
    grpo = config.grpo
    if grpo.filtered_count is not None:
        return grpo.filtered_count == "keep"
    return SEMANTICS[config.chord.semantics].counts_filtered and grpo.loss_type != "bnpo"


def cost_of_preset(config: Config) -> str:
    """What a preset gives up, in words; "" of `paper`, which gives up nothing."""
    semantics, size = SEMANTICS[config.chord.semantics], config.train.micro_batch_size
    if semantics.micro_batches is None:
        return ""
    means = f"means of {size} completions each, so that loss and gradient change with train.micro_batch_size"
    if config.grpo.loss_type in semantics.divided_by_accumulation:
        means = (
            "the rollout loss is divided by the accumulation steps, so that its share changes with "
            "train.micro_batch_size and the number of processes"
        )
    idle = {
        "expert rows are read at mu = 0": semantics.draws_experts_at_0,
        "rollouts are drawn at mu = 1": semantics.draws_rollouts_at_1,
    }
    return "; ".join([means, *(words for words, is_so in idle.items() if is_so)])
