"""What a model family is made of: rows that map parameters, and what its `config.json` may say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch

from chord_megatron.weights.architecture import ModelArchitecture


class TensorLayout(Enum):
    """How the Hugging Face tensors of one parameter are joined and split over tensor-parallel ranks."""

    REPLICATED = "every rank holds the whole tensor"
    COLUMN = "split along dim 0"
    ROW = "split along dim 1"
    GATE_UP = "gate and up, each split along dim 0, then concatenated per rank"
    QKV = "per query group its query heads, then its key, then its value; groups split over ranks"
    VOCAB = "split along dim 0 after padding with zero rows"


def every_layer(arch: ModelArchitecture, layer: int) -> bool:
    return True


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class ParameterMapping:
    """One Megatron parameter; `{layer}` and `{expert}` in a pattern are global numbers."""

    megatron: str  # name under Megatron's local layer spec
    hf: dict[str, tuple[str, ...]]  # Hugging Face name -> symbolic shape, in the order of the layout
    layout: TensorLayout
    te: str | None = None  # name under the Transformer Engine spec, where it differs
    checkpoint: str | None = None  # key in a Megatron checkpoint, where it is neither of these
    also_stored_as: str | None = None  # another key, in checkpoints of Megatron-LM's local layers
    when: Callable[[ModelArchitecture, int], bool] = every_layer  # whether a layer (0-based) has it
    is_copy: bool = False  # of a tensor that another row exports: imported, never exported
    is_float32: bool = False  # whatever the dtype of the model

    @property
    def checkpoint_key(self) -> str:
        """Megatron checkpoints use Transformer Engine's names under either spec; experts share a key."""
        return self.checkpoint or self.te or self.megatron


@dataclass(frozen=True)
class Family:
    """One value of `architectures` in config.json."""

    name: str
    hf_class: str  # as `architectures` names it
    layer: tuple[ParameterMapping, ...]  # the parameters of a layer, in the order of transformers' state dict
    qkv_bias: bool = False
    qk_layernorm: bool = False
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")
    # Field of MixtureOfExperts -> spellings of its key; empty: no experts. The first spelling is written.
    moe_keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    moe_settings: dict[str, Any] = field(default_factory=dict)  # fields that config.json does not choose
    has_latent_attention: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)  # key -> what transformers assumes where it is absent
    only: dict[str, Any] = field(default_factory=dict)  # key -> the one value that is modelled
    harmless: frozenset[str] = frozenset()  # keys that do not change what this model computes
    ignored_tensors: str | None = None  # pattern of tensors that transformers leaves unread, too; {num_layers}

    @property
    def model_type(self) -> str:
        return self.name
