"""Megatron-Core's optimizer of a model and its learning-rate schedule, as the configuration wants them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from chord_megatron.backend.acceleration import Installed, find_installed
from chord_megatron.config import ModelConfig, OptimizerConfig
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import one_line

TORCH_ADAMS = (torch.optim.Adam, torch.optim.AdamW)  # which count their steps by parameter
_HYBRID_SETTINGS = (
    *("offload_fraction", "cpu_optimizer_cls", "gpu_optimizer_cls", "param_update_in_fp32"),
    *("pin_cpu_grads", "pin_cpu_params", "overlap_cpu_optimizer_d2h_h2d"),
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": torch.uint8}


def check_optimizer_here(optimizer: OptimizerConfig, installed: Installed) -> None:
    """Raises UserError where this machine lacks what the optimizer needs."""
    if optimizer.optimizer_cpu_offload and not installed.cuda:
        raise UserError(
            "optimizer.optimizer_cpu_offload needs a GPU to offload from, which this machine lacks; set it to false"
        )
    # Megatron-Core asks for its version in either case, and Apex's Adam has no such states (OptimizerConfig).
    for key in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if getattr(optimizer, key) and not (installed.cuda and installed.adam == "TransformerEngine"):
            raise UserError(
                f"optimizer.{key} needs TransformerEngine's Adam on a GPU, which this machine lacks; set it to false"
            )


def build_optimizer(optimizer: OptimizerConfig, model: ModelConfig, chunks: list[torch.nn.Module]) -> Any:
    """Of this rank's chunks, each within DDP. Raises UserError."""
    check_optimizer_here(optimizer, find_installed())
    try:
        built = get_megatron_optimizer(_optimizer_config(optimizer, model), chunks)
    except (AssertionError, RuntimeError) as error:
        if not optimizer.use_precision_aware_optimizer:
            raise
        raise UserError(f"Megatron-Core refuses optimizer.use_precision_aware_optimizer: {one_line(error)}") from error
    _share_steps(built)
    return built


def _share_steps(optimizer: Any) -> None:
    """Have an Adam of no parameters, as of the experts where a stage has none, save the step of the others.

    DistributedOptimizer.state_dict wants one, which torch's Adam counts by parameter.
    """
    distributed = [inner for inner in optimizer.chained_optimizers if isinstance(inner, DistributedOptimizer)]
    adams = [inner.optimizer for inner in distributed if isinstance(inner.optimizer, TORCH_ADAMS)]

    def add_step(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        steps = (of_parameter["step"] for adam in adams for of_parameter in adam.state.values())
        state["state"]["of no parameter"] = {"step": max(steps, default=torch.zeros(()))}

    for adam in adams:
        if not any(group["params"] for group in adam.param_groups):
            adam.register_state_dict_post_hook(add_step)


def allocate_adam_state(optimizer: Any) -> None:
    """Give every parameter the state of a first step: no Adam has any before, so nothing would be saved or loaded."""
    for inner in optimizer.chained_optimizers:
        for plain in plain_optimizers(inner):
            for group in plain.param_groups:
                for parameter in group["params"]:
                    if not plain.state[parameter]:
                        plain.state[parameter] = _first_state(plain, group, parameter, inner.config)
        if isinstance(inner.optimizer, HybridDeviceOptimizer):
            inner.optimizer._sync_sub_optimizers_state_to_hdo()  # noqa: SLF001 - as at the end of its step


def _first_state(
    plain: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, config: MegatronOptimizerConfig
) -> dict[str, Any]:
    if config.use_precision_aware_optimizer and not config.optimizer_cpu_offload:
        fused: Any = plain
        fused.initialize_state(parameter, config.store_param_remainders)
        return fused.state[parameter]
    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    if not isinstance(plain, TORCH_ADAMS):
        return moments
    device = parameter.device if group.get("fused") else None
    return {"step": torch.zeros((), dtype=torch.float32, device=device), **moments}


def drop_hybrid_settings(state: dict[str, Any]) -> None:
    """Take out of an optimizer's state what HybridDeviceOptimizer notes of itself in its groups, classes among it.

    Checkpoints then are the same whoever steps, and hold nothing that runs code when it is read.
    """
    for key, value in state.items():
        if key == "param_groups":
            for group in value:
                for name in _HYBRID_SETTINGS:
                    group.pop(name, None)
        elif isinstance(value, dict):
            drop_hybrid_settings(value)


def plain_optimizers(inner: Any) -> list[torch.optim.Optimizer]:
    """Those that step within one of Megatron-Core's: one, or those of the device and of the host."""
    return inner.optimizer.sub_optimizers if isinstance(inner.optimizer, HybridDeviceOptimizer) else [inner.optimizer]


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
        # Megatron-LM asks for both: the states are then the inner optimizer's own.
        use_precision_aware_optimizer=optimizer.use_precision_aware_optimizer or optimizer.optimizer_cpu_offload,
        # With remainders, checkpoints that are gathered cannot be loaded (FusedAdam.set_scaled_state).
        store_param_remainders=False,
        optimizer_cpu_offload=optimizer.optimizer_cpu_offload,
        optimizer_offload_fraction=optimizer.optimizer_offload_fraction,
        **{
            key: _DTYPES[getattr(optimizer, key)]
            for key in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
        },
        **{
            key: getattr(optimizer, key)
            for key in ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
        },
    )
