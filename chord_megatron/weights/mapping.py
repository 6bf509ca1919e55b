"""Which Megatron parameter is made of which Hugging Face tensors, for one architecture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.families import FAMILIES
from chord_megatron.weights.families.common import EMBEDDING, FINAL_NORM, HF_HEAD, OUTPUT, TIED_OUTPUT
from chord_megatron.weights.schema import ParameterMapping, TensorSpec

_VOCAB_MULTIPLE = 128  # Megatron-LM's --make-vocab-size-divisible-by


class MappedParameter(NamedTuple):
    """A row of the table at one layer and expert."""

    mapping: ParameterMapping
    layer: int | None
    expert: int | None

    @property
    def local_name(self) -> str:
        """Name under Megatron's local layer spec."""
        return self.name(self.mapping.megatron)

    def name(self, pattern: str) -> str:
        """A name of this parameter or of one of its Hugging Face tensors."""
        return pattern.format(layer=self.layer, expert=self.expert)


def mapped_parameters(arch: ModelArchitecture) -> Iterator[MappedParameter]:
    """All parameters of the model: the embedding, the layers, the final norm, the output."""
    yield MappedParameter(EMBEDDING, None, None)
    for layer in range(arch.num_layers):
        for row, expert in _layer_rows(arch, layer):
            yield MappedParameter(row, layer, expert)
    yield MappedParameter(FINAL_NORM, None, None)
    yield MappedParameter(TIED_OUTPUT if arch.tie_word_embeddings else OUTPUT, None, None)


def find_mapping(name: str, arch: ModelArchitecture) -> MappedParameter:
    """The table row of a Megatron parameter, local or Transformer Engine name; UserError when there is none."""
    found = _by_name(arch).get(name)
    if found is None:
        raise UserError(
            f"no Hugging Face tensor is mapped to the Megatron parameter {name} of a {arch.num_layers}-layer "
            f"{arch.family} model; build the model from the same config.json as the weights."
        )
    return found


def hf_shapes(parameter: MappedParameter, arch: ModelArchitecture) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> full shape of the tensors that make up one parameter."""
    sizes = _sizes(arch)
    return {parameter.name(name): tuple(sizes[dim] for dim in dims) for name, dims in parameter.mapping.hf.items()}


def parameter_names(arch: ModelArchitecture) -> list[str]:
    """Local-spec names of all parameters that are exported, in their order."""
    return [parameter.local_name for parameter in mapped_parameters(arch) if not parameter.mapping.is_copy]


def hf_tensors(arch: ModelArchitecture, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Hugging Face name -> dtype and shape of all tensors that a model in `dtype` exports, in their order."""
    return {
        name: TensorSpec(torch.float32 if parameter.mapping.is_float32 else dtype, shape)
        for parameter in mapped_parameters(arch)
        if not parameter.mapping.is_copy
        for name, shape in hf_shapes(parameter, arch).items()
    }


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The vocabulary rounded up so that it splits over TP; the same for every TP size that divides 128."""
    multiple = _VOCAB_MULTIPLE if _VOCAB_MULTIPLE % tp_size == 0 else _VOCAB_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple


def is_ignorable(hf_name: str, arch: ModelArchitecture) -> bool:
    """Whether a checkpoint may hold this tensor although nothing reads it."""
    # Old Llama checkpoints save the rotary buffer; some tied ones repeat the embedding as lm_head (tied_head.py).
    if hf_name.endswith("rotary_emb.inv_freq") or (arch.tie_word_embeddings and hf_name == HF_HEAD):
        return True
    pattern = FAMILIES[arch.family].ignored_tensors
    return pattern is not None and re.fullmatch(pattern.format(num_layers=arch.num_layers), hf_name) is not None


def _layer_rows(arch: ModelArchitecture, layer: int) -> Iterator[tuple[ParameterMapping, int | None]]:
    """The rows of a layer; those of the experts together, expert by expert."""
    rows = [row for row in FAMILIES[arch.family].layer if row.when(arch, layer)]
    of_experts = [row for row in rows if "{expert}" in row.megatron]
    for row in rows:
        if row not in of_experts:
            yield row, None
        elif row is of_experts[0] and arch.moe is not None:
            for expert in range(arch.moe.num_experts):
                yield from ((of_expert, expert) for of_expert in of_experts)


@lru_cache(maxsize=8)
def _by_name(arch: ModelArchitecture) -> dict[str, MappedParameter]:
    return {
        parameter.name(pattern): parameter
        for parameter in mapped_parameters(arch)
        for pattern in (parameter.mapping.megatron, parameter.mapping.te)
        if pattern is not None
    }


@lru_cache(maxsize=8)
def _sizes(arch: ModelArchitecture) -> dict[str, int]:
    """What the symbolic dimensions of the tables stand for."""
    heads, moe, mla = arch.num_attention_heads, arch.moe, arch.mla
    sizes = {
        "vocab": arch.vocab_size,
        "hidden": arch.hidden_size,
        "ffn": arch.ffn_hidden_size,
        "query": heads * arch.head_dim,
        "key": arch.num_query_groups * arch.head_dim,
        "value": heads * arch.head_dim,
        "head": arch.head_dim,
    }
    if moe is not None:
        sizes |= {"experts": moe.num_experts, "expert_ffn": moe.ffn_hidden_size}
        sizes |= {"shared_ffn": moe.shared_ffn_hidden_size or 0}
    if mla is not None:
        sizes |= {
            "q_lora": mla.q_lora_rank or 0,
            "kv_lora": mla.kv_lora_rank,
            "kv_lora_and_rope": mla.kv_lora_rank + mla.qk_rope_head_dim,
            "key_and_value": heads * (mla.qk_nope_head_dim + mla.v_head_dim),
            "value": heads * mla.v_head_dim,
        }
    return sizes
