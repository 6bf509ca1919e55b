"""Rules of the batch arithmetic: how many rows, tokens and steps."""

from __future__ import annotations

import math

from chord_megatron.algorithm.presets import SEMANTICS
from chord_megatron.config import Config
from chord_megatron.planning.schedule import needs_rollouts
from chord_megatron.planning.steps import check_length_of_run, is_counted
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture


def check_batches(config: Config, data_parallel_size: int) -> None:
    """That groups are whole and micro-batches full, where they are counted in rows; nothing where none is drawn."""
    size, micro_batch_size = config.train.global_batch_size, config.train.micro_batch_size
    counts_experts = config.chord.chord_sft_per_device_train_batch_size is not None
    if not (needs_rollouts(config) or counts_experts):
        return
    if size is None:
        wanted = "while mu < 1; for supervised training alone set chord.chord_mu_peak=1 and chord.chord_mu_valley=1"
        if counts_experts:
            wanted = "by chord.chord_sft_per_device_train_batch_size; or set chord.chord_sft_global_batch_size instead"
        raise UserError(f"train.global_batch_size, the completions of an optimizer step, is required {wanted}")
    num_generations = config.rollout.num_generations
    share = micro_batch_size * data_parallel_size if counts_rows(config) else 1
    remedy = f"set train.global_batch_size to {_multiples_around(size, math.lcm(num_generations, share))}"
    if size % num_generations:
        raise UserError(
            f"train.global_batch_size={size} completions is not a multiple of rollout.num_generations="
            f"{num_generations}, and every prompt needs its whole group; {remedy}"
        )
    if size % share:
        raise UserError(
            f"train.global_batch_size={size} is not a multiple of train.micro_batch_size x data-parallel size = "
            f"{micro_batch_size} x {data_parallel_size} = {share}; {remedy}"
        )


def counts_rows(config: Config) -> bool:
    """Whether something depends on how many rows are in a micro-batch."""
    is_cut_by_rows = config.train.max_tokens_per_micro_batch is None
    has_means_of_rows = SEMANTICS[config.chord.semantics].micro_batches is not None
    return is_cut_by_rows or has_means_of_rows or config.chord.chord_sft_per_device_train_batch_size is not None


def check_lengths(config: Config, arch: ModelArchitecture) -> None:
    """That the model, and a micro-batch, hold as many tokens as prompts, completions and experts have."""
    _check_lengths_of_model(config, arch)
    budget, chord = config.train.max_tokens_per_micro_batch, config.chord
    if budget is None:
        return
    longest = {}
    if needs_rollouts(config):
        prompt, completion = config.data.max_prompt_length, config.rollout.max_completion_length
        keys = "data.max_prompt_length + rollout.max_completion_length"
        longest[f"{keys} = {prompt} + {completion} = {prompt + completion}"] = prompt + completion
    if chord.chord_sft_dataset is not None and chord.chord_sft_max_length is not None:
        longest[f"chord.chord_sft_max_length = {chord.chord_sft_max_length}"] = chord.chord_sft_max_length
    for what, tokens in longest.items():
        if tokens > budget:
            raise UserError(
                f"train.max_tokens_per_micro_batch={budget} holds no row of {what} tokens; set it to at least {tokens}"
            )


def _check_lengths_of_model(config: Config, arch: ModelArchitecture) -> None:
    limit = arch.max_position_embeddings
    if config.chord.chord_sft_dataset is not None and expert_max_length(config, arch) > limit:
        raise UserError(
            f"chord.chord_sft_max_length={config.chord.chord_sft_max_length}, but the model reads {limit} tokens; "
            "lower it, or set it to null"
        )
    if not needs_rollouts(config) and config.data.eval_dataset is None:
        return  # nothing is completed
    prompt, completion = config.data.max_prompt_length, config.rollout.max_completion_length
    if completion >= limit:
        raise UserError(
            f"rollout.max_completion_length={completion} leaves no room for a prompt in the {limit} tokens that the "
            "model reads; lower it"
        )
    if prompt + completion > limit:
        raise UserError(
            f"data.max_prompt_length + rollout.max_completion_length = {prompt} + {completion} = {prompt + completion} "
            f"tokens, but the model reads {limit}; set data.max_prompt_length to at most {limit - completion}"
        )


def expert_max_length(config: Config, arch: ModelArchitecture) -> int:
    """Tokens of prompt and answer of an expert row."""
    configured = config.chord.chord_sft_max_length
    return arch.max_position_embeddings if configured is None else configured


def check_steps(config: Config, steps_per_rollout: int) -> None:
    """That counts of steps fit one another, and the optimizer's numbers, too."""
    train, optimizer = config.train, config.optimizer
    check_length_of_run(config)
    iterations = train.train_iters if is_counted(config) else None
    for name, value in (("train_iters", iterations), ("save_steps", train.save_steps)):
        if value is not None and value % steps_per_rollout:
            raise UserError(
                f"train.{name}={value} is not a multiple of grpo.steps_per_generation x num_iterations = "
                f"{steps_per_rollout}, and a generation batch is not kept in checkpoints; set it to "
                f"{_multiples_around(value, steps_per_rollout)}"
            )
    if optimizer.min_lr > optimizer.lr:
        raise UserError(f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}; lower it")
    if optimizer.lr * optimizer.weight_decay >= 1:
        raise UserError(
            f"optimizer.lr x weight_decay = {optimizer.lr} x {optimizer.weight_decay} takes away a whole weight in a "
            "step; lower one of them"
        )
    if optimizer.lr_warmup_iters >= train.train_iters:
        raise UserError(
            f"optimizer.lr_warmup_iters={optimizer.lr_warmup_iters} must be below train.train_iters="
            f"{train.train_iters}; lower it"
        )


def _multiples_around(value: int, divisor: int) -> str:
    """The multiples of `divisor` next to `value`, which is none."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"
