"""Rules of what the backward pass computes again: which parts a model has."""

from __future__ import annotations

from chord_megatron.config import ModelConfig
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture


def check_recomputation(model: ModelConfig, arch: ModelArchitecture) -> None:
    """That whole layers have a method, and that the model has the parts. Raises UserError."""
    for key in ("recompute_method", "recompute_num_layers"):
        value = getattr(model, key)
        if value is not None and not model.recomputes_layers:
            raise UserError(f"model.{key}={value} is for model.recompute=full, whole layers; remove it or set that")
    for module in model.recompute if isinstance(model.recompute, list) else ():
        if lacking := _lacking(module, arch):
            raise UserError(f"model.recompute names {module}, but the model has no {lacking}; remove it from the list")


def _lacking(module: str, arch: ModelArchitecture) -> str | None:
    """What a module is part of, where the model has none."""
    moe = arch.moe
    needed = {
        "mla_up_proj": ("latent attention", arch.mla),
        "moe": ("experts", moe),
        "moe_act": ("experts", moe),
        "shared_experts": ("shared experts", moe and moe.shared_ffn_hidden_size),
        "mlp": ("layer without experts", moe is None or moe.dense_layers),
    }
    what, found = needed.get(module, ("", True))
    return None if found else what
