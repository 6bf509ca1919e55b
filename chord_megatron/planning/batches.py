"""Rules of the batch arithmetic: how many rows, tokens and steps."""

from __future__ import annotations

from chord_megatron.config import Config
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture


def check_batches(config: Config, data_parallel_size: int) -> None:
    """That groups are whole and micro-batches full."""
    train, num_generations = config.train, config.rollout.num_generations
    if train.global_batch_size % num_generations:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} completions is not a multiple of "
            f"rollout.num_generations={num_generations}; every prompt needs its whole group"
        )
    share = train.micro_batch_size * data_parallel_size
    if train.global_batch_size % share:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size x "
            f"data-parallel size = {train.micro_batch_size} x {data_parallel_size} = {share}"
        )


def check_lengths(config: Config, arch: ModelArchitecture) -> None:
    """That the model reads as many tokens as prompts, completions and experts have."""
    longest = config.data.max_prompt_length + config.rollout.max_completion_length
    if longest > arch.max_position_embeddings:
        raise UserError(
            f"data.max_prompt_length + rollout.max_completion_length = {longest} tokens, but the model reads "
            f"{arch.max_position_embeddings}; lower one of them"
        )
    if config.chord.chord_sft_dataset is not None and config.chord.chord_sft_max_length > arch.max_position_embeddings:
        raise UserError(
            f"chord.chord_sft_max_length={config.chord.chord_sft_max_length}, but the model reads "
            f"{arch.max_position_embeddings} tokens; lower it"
        )


def check_steps(config: Config, steps_per_rollout: int) -> None:
    """That counts of steps fit one another."""
    train, optimizer = config.train, config.optimizer
    for name, value in (("train_iters", train.train_iters), ("save_steps", train.save_steps)):
        if value is not None and value % steps_per_rollout:
            raise UserError(
                f"train.{name}={value} is not a multiple of grpo.steps_per_generation x num_iterations = "
                f"{steps_per_rollout}; a generation batch is not kept in checkpoints"
            )
    if optimizer.min_lr > optimizer.lr:
        raise UserError(f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}")
    if optimizer.lr_warmup_iters >= train.train_iters:
        raise UserError(
            f"optimizer.lr_warmup_iters={optimizer.lr_warmup_iters} must be below train.train_iters={train.train_iters}"
        )
