"""Which Megatron parameter is made of which Hugging Face tensors: one declarative table per family."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from chord_megatron.convert.architecture import ModelArchitecture
from chord_megatron.types import UserError


class Layout(Enum):
    """How the Hugging Face tensors of one parameter are joined and split over tensor-parallel ranks."""

    REPLICATED = "every rank holds the whole tensor"
    ROW = "split along dim 1"
    GATE_UP = "gate and up, each split along dim 0, then concatenated per rank"
    QKV = "per query group its query heads, then its key, then its value; groups split over ranks"
    VOCAB = "split along dim 0 after padding with zero rows"


@dataclass(frozen=True)
class Mapping:
    """One parameter; `{layer}` in a pattern is the global layer number."""

    megatron: str  # name under Megatron's local layer spec
    hf: dict[str, tuple[str, ...]]  # Hugging Face name -> symbolic shape, in the order of the layout
    layout: Layout
    te: str | None = None  # name under the Transformer Engine spec, where it differs
    is_copy: bool = False  # of a tensor that another row exports: imported, never exported


_MCORE = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."

_EMBEDDING = Mapping(
    "embedding.word_embeddings.weight", {"model.embed_tokens.weight": ("vocab", "hidden")}, Layout.VOCAB
)
_FINAL_NORM = Mapping("decoder.final_layernorm.weight", {"model.norm.weight": ("hidden",)}, Layout.REPLICATED)
_OUTPUT = Mapping("output_layer.weight", {"lm_head.weight": ("vocab", "hidden")}, Layout.VOCAB)
# With tied embeddings only the last pipeline stage has this parameter: its own copy of the embedding.
_TIED_OUTPUT = Mapping(_OUTPUT.megatron, _EMBEDDING.hf, Layout.VOCAB, is_copy=True)

_INPUT_NORM = Mapping(
    _MCORE + "input_layernorm.weight",
    {_HF + "input_layernorm.weight": ("hidden",)},
    Layout.REPLICATED,
    te=_MCORE + "self_attention.linear_qkv.layer_norm_weight",
)
_QKV_WEIGHT = Mapping(
    _MCORE + "self_attention.linear_qkv.weight",
    {
        _HF + "self_attn.q_proj.weight": ("query", "hidden"),
        _HF + "self_attn.k_proj.weight": ("key", "hidden"),
        _HF + "self_attn.v_proj.weight": ("key", "hidden"),
    },
    Layout.QKV,
)
_QKV_BIAS = Mapping(
    _MCORE + "self_attention.linear_qkv.bias",
    {
        _HF + "self_attn.q_proj.bias": ("query",),
        _HF + "self_attn.k_proj.bias": ("key",),
        _HF + "self_attn.v_proj.bias": ("key",),
    },
    Layout.QKV,
)
_QK_NORM = tuple(
    Mapping(
        _MCORE + f"self_attention.{x}_layernorm.weight",
        {_HF + f"self_attn.{x}_norm.weight": ("head",)},
        Layout.REPLICATED,
    )
    for x in "qk"
)
_PROJECTION_AND_MLP = (
    Mapping(
        _MCORE + "self_attention.linear_proj.weight",
        {_HF + "self_attn.o_proj.weight": ("hidden", "query")},
        Layout.ROW,
    ),
    Mapping(
        _MCORE + "pre_mlp_layernorm.weight",
        {_HF + "post_attention_layernorm.weight": ("hidden",)},
        Layout.REPLICATED,
        te=_MCORE + "mlp.linear_fc1.layer_norm_weight",
    ),
    Mapping(
        _MCORE + "mlp.linear_fc1.weight",
        {_HF + "mlp.gate_proj.weight": ("ffn", "hidden"), _HF + "mlp.up_proj.weight": ("ffn", "hidden")},
        Layout.GATE_UP,
    ),
    Mapping(_MCORE + "mlp.linear_fc2.weight", {_HF + "mlp.down_proj.weight": ("hidden", "ffn")}, Layout.ROW),
)

# The rows of one layer.
FAMILIES: dict[str, tuple[Mapping, ...]] = {
    "llama": (_INPUT_NORM, _QKV_WEIGHT, *_PROJECTION_AND_MLP),
    "qwen2": (_INPUT_NORM, _QKV_WEIGHT, _QKV_BIAS, *_PROJECTION_AND_MLP),
    "qwen3": (_INPUT_NORM, _QKV_WEIGHT, *_QK_NORM, *_PROJECTION_AND_MLP),
}


def _output(arch: ModelArchitecture) -> Mapping:
    return _TIED_OUTPUT if arch.tie_word_embeddings else _OUTPUT


def _rows(arch: ModelArchitecture) -> list[tuple[Mapping, int | None]]:
    layers = [(row, layer) for layer in range(arch.num_layers) for row in FAMILIES[arch.family]]
    return [(_EMBEDDING, None), *layers, (_FINAL_NORM, None), (_output(arch), None)]


def find_mapping(name: str, arch: ModelArchitecture) -> tuple[Mapping, int | None]:
    """The table row and layer of a Megatron parameter, local or TE name; UserError when there is none."""
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    layer = int(match[1]) if match else None
    pattern = _MCORE + name[match.end() :] if match else name
    for row in (_EMBEDDING, *FAMILIES[arch.family], _FINAL_NORM, _output(arch)):
        if pattern in (row.megatron, row.te) and (layer is None or layer < arch.num_layers):
            return row, layer
    raise UserError(
        f"no Hugging Face tensor is mapped to the Megatron parameter {name} of a {arch.num_layers}-layer "
        f"{arch.family} model; build the model from the same config.json as the weights."
    )


def hf_shapes(mapping: Mapping, layer: int | None, arch: ModelArchitecture) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> full shape of the tensors that make up one parameter."""
    sizes = {
        "vocab": arch.vocab_size,
        "hidden": arch.hidden_size,
        "ffn": arch.ffn_hidden_size,
        "query": arch.num_attention_heads * arch.head_dim,
        "key": arch.num_query_groups * arch.head_dim,
        "head": arch.head_dim,
    }
    return {name.format(layer=layer): tuple(sizes[dim] for dim in dims) for name, dims in mapping.hf.items()}


def parameter_names(arch: ModelArchitecture) -> list[str]:
    """Local-spec names of all parameters that are exported: embedding, layers, final norm, output."""
    return [row.megatron.format(layer=layer) for row, layer in _rows(arch) if not row.is_copy]


def hf_names(arch: ModelArchitecture) -> set[str]:
    """Names of all Hugging Face tensors of the model."""
    return {name.format(layer=layer) for row, layer in _rows(arch) for name in row.hf}


def is_ignorable(hf_name: str, arch: ModelArchitecture) -> bool:
    """Whether a checkpoint may hold this tensor although nothing reads it."""
    # Old Llama checkpoints save the rotary buffer; some tied ones repeat the embedding as lm_head.
    return hf_name.endswith("rotary_emb.inv_freq") or (arch.tie_word_embeddings and hf_name == "lm_head.weight")
