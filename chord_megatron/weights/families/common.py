"""Rows that several families share."""

from __future__ import annotations

from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.schema import ParameterMapping, TensorLayout

MCORE = "decoder.layers.{layer}."
HF = "model.layers.{layer}."


def is_dense(arch: ModelArchitecture, layer: int) -> bool:
    return not arch.is_moe_layer(layer)


def is_moe(arch: ModelArchitecture, layer: int) -> bool:
    return arch.is_moe_layer(layer)


HF_EMBEDDING, HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Outside the layers.
EMBEDDING = ParameterMapping(
    "embedding.word_embeddings.weight", {HF_EMBEDDING: ("vocab", "hidden")}, TensorLayout.VOCAB
)
FINAL_NORM = ParameterMapping(
    "decoder.final_layernorm.weight", {"model.norm.weight": ("hidden",)}, TensorLayout.REPLICATED
)
OUTPUT = ParameterMapping("output_layer.weight", {HF_HEAD: ("vocab", "hidden")}, TensorLayout.VOCAB)
# With tied embeddings only the last pipeline stage has this parameter: its own copy of the embedding.
TIED_OUTPUT = ParameterMapping(OUTPUT.megatron, EMBEDDING.hf, TensorLayout.VOCAB, is_copy=True)

# Grouped-query attention. Transformer Engine fuses the norm before it into the projection.
INPUT_NORM = ParameterMapping(
    MCORE + "input_layernorm.weight",
    {HF + "input_layernorm.weight": ("hidden",)},
    TensorLayout.REPLICATED,
    te=MCORE + "self_attention.linear_qkv.layer_norm_weight",
)
QKV_WEIGHT = ParameterMapping(
    MCORE + "self_attention.linear_qkv.weight",
    {
        HF + "self_attn.q_proj.weight": ("query", "hidden"),
        HF + "self_attn.k_proj.weight": ("key", "hidden"),
        HF + "self_attn.v_proj.weight": ("key", "hidden"),
    },
    TensorLayout.QKV,
)
QKV_BIAS = ParameterMapping(
    MCORE + "self_attention.linear_qkv.bias",
    {
        HF + "self_attn.q_proj.bias": ("query",),
        HF + "self_attn.k_proj.bias": ("key",),
        HF + "self_attn.v_proj.bias": ("key",),
    },
    TensorLayout.QKV,
)
QK_NORMS = tuple(
    ParameterMapping(
        MCORE + f"self_attention.{x}_layernorm.weight",
        {HF + f"self_attn.{x}_norm.weight": ("head",)},
        TensorLayout.REPLICATED,
    )
    for x in "qk"
)
ATTENTION_OUTPUT = ParameterMapping(
    MCORE + "self_attention.linear_proj.weight", {HF + "self_attn.o_proj.weight": ("hidden", "value")}, TensorLayout.ROW
)

# A plain MLP and the norm before it.
MLP = (
    ParameterMapping(
        MCORE + "mlp.linear_fc1.weight",
        {HF + "mlp.gate_proj.weight": ("ffn", "hidden"), HF + "mlp.up_proj.weight": ("ffn", "hidden")},
        TensorLayout.GATE_UP,
        when=is_dense,
    ),
    ParameterMapping(
        MCORE + "mlp.linear_fc2.weight",
        {HF + "mlp.down_proj.weight": ("hidden", "ffn")},
        TensorLayout.ROW,
        when=is_dense,
    ),
)
POST_ATTENTION_NORM = ParameterMapping(
    MCORE + "pre_mlp_layernorm.weight",
    {HF + "post_attention_layernorm.weight": ("hidden",)},
    TensorLayout.REPLICATED,
    te=MCORE + "mlp.linear_fc1.layer_norm_weight",
    when=is_dense,
)

# Experts: never split over tensor-parallel ranks, so that GATE_UP and ROW join whole tensors.
POST_ATTENTION_NORM_MOE = ParameterMapping(
    POST_ATTENTION_NORM.megatron,
    POST_ATTENTION_NORM.hf,
    TensorLayout.REPLICATED,
    # As if it were fused there, too (gpt_layer_specs.py, get_gpt_layer_local_spec).
    also_stored_as=POST_ATTENTION_NORM.te,
    when=is_moe,
)


def router(gate: str) -> ParameterMapping:
    """The router's weight under its Hugging Face name within a layer."""
    return ParameterMapping(
        MCORE + "mlp.router.weight", {HF + gate: ("experts", "hidden")}, TensorLayout.REPLICATED, when=is_moe
    )


def experts(
    prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[ParameterMapping, ...]:
    """The experts' matrices under their Hugging Face names; `prefix` within a layer, with `{expert}`."""
    local, grouped, stacked = (MCORE + f"mlp.experts.{x}" for x in ("local_experts.{expert}.", "", "experts."))
    return (
        ParameterMapping(
            local + "linear_fc1.weight",
            {
                HF + f"{prefix}.{gate}.weight": ("expert_ffn", "hidden"),
                HF + f"{prefix}.{up}.weight": ("expert_ffn", "hidden"),
            },
            TensorLayout.GATE_UP,
            te=grouped + "linear_fc1.weight{expert}",
            checkpoint=stacked + "linear_fc1.weight",
            when=is_moe,
        ),
        ParameterMapping(
            local + "linear_fc2.weight",
            {HF + f"{prefix}.{down}.weight": ("hidden", "expert_ffn")},
            TensorLayout.ROW,
            te=grouped + "linear_fc2.weight{expert}",
            checkpoint=stacked + "linear_fc2.weight",
            when=is_moe,
        ),
    )
