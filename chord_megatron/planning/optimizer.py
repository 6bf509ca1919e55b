"""Rules of the optimizer's memory: fewer bits, and the host."""

from __future__ import annotations

from chord_megatron.config import Config, OptimizerConfig
from chord_megatron.system.errors import UserError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
_STATES = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def check_optimizer(config: Config) -> None:
    """Raises UserError. What a machine lacks for it, backend/preflight.py says."""
    optimizer = config.optimizer
    for key in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if getattr(optimizer, key) and not optimizer.use_distributed_optimizer:
            raise UserError(f"optimizer.{key} needs optimizer.use_distributed_optimizer=true; set it")
        if getattr(optimizer, key) and config.model.dtype != "bfloat16":
            raise UserError(f"optimizer.{key} is for model.dtype=bfloat16; set that, or optimizer.{key}=false")
    for key in ("main_grads_dtype", *_STATES):
        dtype = getattr(optimizer, key)
        if dtype != "float32" and not optimizer.use_precision_aware_optimizer:
            raise UserError(f"optimizer.{key}={dtype} needs optimizer.use_precision_aware_optimizer=true; set it")
        if dtype != "float32" and key in _STATES and optimizer.optimizer_cpu_offload:
            raise UserError(
                f"optimizer.{key}={dtype}, but optimizer.optimizer_cpu_offload has the states in float32; set one of "
                "them back"
            )
        if dtype == "fp8" and config.rollout.offload_optimizer:
            raise UserError(
                f"optimizer.{key}=fp8 cannot leave the GPU as rollout.offload_optimizer=true wants it; set one of them "
                "back"
            )
    fraction = optimizer.optimizer_offload_fraction
    if fraction != OptimizerConfig().optimizer_offload_fraction and not optimizer.optimizer_cpu_offload:
        raise UserError(
            f"optimizer.optimizer_offload_fraction={fraction} is for optimizer.optimizer_cpu_offload=true; set that, "
            "or remove it"
        )
