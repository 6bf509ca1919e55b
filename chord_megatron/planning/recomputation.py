"""What the backward pass computes again: rules, and what is left to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chord_megatron.config import ModelConfig
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture


@dataclass(frozen=True)
class Recomputation:
    """What a configuration has computed again."""

    model: ModelConfig

    @property
    def modules(self) -> frozenset[str]:
        """Parts of every layer."""
        return frozenset(self.model.recompute) if isinstance(self.model.recompute, list) else frozenset()

    @property
    def layers_at_once(self) -> int:
        """Whole layers of which everything is there at a time; 0: none are computed again."""
        if not self.model.recomputes_layers:
            return 0
        return 1 if self.model.recompute_method == "block" else self.model.recompute_num_layers or 1

    def kept(self, layers: Sequence[float], hidden: float) -> float:
        """Bytes a token of a model chunk's layers, of which each keeps so many; hidden: of the input of a layer.

        Of every N layers the input of the first (uniform), or of the first N layers the input of each (block).
        """
        number = self.model.recompute_num_layers or 1
        if not self.model.recomputes_layers:
            return sum(layers)
        if self.model.recompute_method == "block":
            return hidden * len(layers[:number]) + sum(layers[number:])
        return hidden * -(-len(layers) // number)


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
