"""Megatron-Core's optimizer of a model and its learning-rate schedule, as the configuration wants them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from chord_megatron.config import ModelConfig, OptimizerConfig


def build_optimizer(optimizer: OptimizerConfig, model: ModelConfig, chunks: list[torch.nn.Module]) -> Any:
    """Of this rank's chunks, each within DDP."""
    return get_megatron_optimizer(_optimizer_config(optimizer, model), chunks)


def build_scheduler(megatron_optimizer: Any, config: OptimizerConfig, train_iters: int) -> OptimizerParamScheduler:
    """Of the learning rate, over a run of `train_iters` steps."""
    return OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=max(train_iters, config.lr_warmup_iters + 1),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # The configuration rules, so that a finished run goes on with a larger train_iters.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _optimizer_config(optimizer: OptimizerConfig, model: ModelConfig) -> MegatronOptimizerConfig:
    return MegatronOptimizerConfig(
        optimizer="adam",
        bf16=model.dtype == "bfloat16",
        params_dtype=torch.bfloat16 if model.dtype == "bfloat16" else torch.float32,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
        **{
            key: getattr(optimizer, key)
            for key in ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
        },
    )
