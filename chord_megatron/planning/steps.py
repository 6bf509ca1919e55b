"""How long a run is where the configuration says it in epochs, and its warm-up as a share: known with the data."""

from __future__ import annotations

import math

from chord_megatron.config import Config
from chord_megatron.config_types import LARGEST_INTEGER
from chord_megatron.planning.schedule import needs_rollouts
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import counted


def check_length_of_run(config: Config) -> None:
    """That a run's length, and its warm-up, are said once. Raises UserError."""
    train, optimizer = config.train, config.optimizer
    if train.num_train_epochs is not None and train.train_iters != LARGEST_INTEGER:
        raise UserError(
            f"train.train_iters={train.train_iters} and train.num_train_epochs={train.num_train_epochs:g} both say how "
            "long the run is; set one of them to null"
        )
    if optimizer.lr_warmup_ratio is not None and optimizer.lr_warmup_iters:
        raise UserError(
            f"optimizer.lr_warmup_iters={optimizer.lr_warmup_iters} and optimizer.lr_warmup_ratio="
            f"{optimizer.lr_warmup_ratio:g} both say how long the learning rate rises; remove one of them"
        )


def is_counted(config: Config) -> bool:
    """Whether train.train_iters is known without the data."""
    return config.train.num_train_epochs is None


def in_steps(config: Config, *, prompts: int, experts: int, expert_rows_per_step: int) -> tuple[Config, str | None]:
    """The configuration with its steps, in numbers, and how they were counted; the same, None where nothing is to do.

    prompts, experts: usable rows of each. A run of epochs has as many whole draws as they hold, at least one: a row is
    read at most once more than the epochs say. The warm-up is rounded up, as in transformers.
    """
    line = None
    if not is_counted(config):
        steps, line = _steps(config, prompts, experts, expert_rows_per_step)
        train = config.train.model_copy(update={"train_iters": steps, "num_train_epochs": None})
        config = config.model_copy(update={"train": train})
    ratio = config.optimizer.lr_warmup_ratio
    if ratio is not None:
        steps = config.train.train_iters
        warmup = min(math.ceil(round(ratio * steps, 6)), steps - 1)  # 0.05 x 100 is a little above 5
        optimizer = config.optimizer.model_copy(update={"lr_warmup_iters": warmup, "lr_warmup_ratio": None})
        config = config.model_copy(update={"optimizer": optimizer})
    return config, line


def _steps(config: Config, prompts: int, experts: int, expert_rows_per_step: int) -> tuple[int, str]:
    epochs, grpo = config.train.num_train_epochs, config.grpo
    assert epochs is not None
    draws_rollouts = needs_rollouts(config)
    rows, what = (prompts, "prompts") if draws_rollouts else (experts, "expert rows")
    prompts_of_a_step = (config.train.global_batch_size or 0) // config.rollout.num_generations
    in_a_step = prompts_of_a_step if draws_rollouts else max(1, expert_rows_per_step)
    # A generation batch has the prompts of steps_per_generation steps, and is used num_iterations times.
    in_a_draw = in_a_step * grpo.steps_per_generation
    draws = max(1, math.floor(epochs * rows / in_a_draw))
    steps = draws * grpo.steps_per_generation * grpo.num_iterations
    if steps >= LARGEST_INTEGER:
        raise UserError(f"train.num_train_epochs={epochs:g} of {rows} {what} are {steps} steps; lower it")
    times = f", {grpo.num_iterations} times" if grpo.num_iterations > 1 else ""
    said = f"{counted(epochs, 'epoch')} of {rows} {what}, {in_a_step} a step{times}"
    return steps, f"{counted(steps, 'step')}: {said}"
