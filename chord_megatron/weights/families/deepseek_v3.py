"""DeepSeek-V3 and R1 in bfloat16: latent attention, shared experts, sigmoid routing with a bias, YaRN."""

from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.families import common
from chord_megatron.weights.families.common import HF, MCORE
from chord_megatron.weights.schema import Family, ParameterMapping, TensorLayout

ATTENTION = MCORE + "self_attention."


def _has_query_lora(arch: ModelArchitecture, layer: int) -> bool:
    return arch.mla is not None and arch.mla.q_lora_rank is not None


def _has_shared_experts(arch: ModelArchitecture, layer: int) -> bool:
    return arch.is_moe_layer(layer) and arch.moe is not None and arch.moe.shared_ffn_hidden_size is not None


def _has_plain_query(arch: ModelArchitecture, layer: int) -> bool:
    return not _has_query_lora(arch, layer)


_ATTENTION = (
    ParameterMapping(
        ATTENTION + "linear_q_proj.weight",
        {HF + "self_attn.q_proj.weight": ("query", "hidden")},
        TensorLayout.COLUMN,
        when=_has_plain_query,
    ),
    ParameterMapping(
        ATTENTION + "linear_q_down_proj.weight",
        {HF + "self_attn.q_a_proj.weight": ("q_lora", "hidden")},
        TensorLayout.REPLICATED,
        when=_has_query_lora,
    ),
    ParameterMapping(
        ATTENTION + "q_layernorm.weight",
        {HF + "self_attn.q_a_layernorm.weight": ("q_lora",)},
        TensorLayout.REPLICATED,
        te=ATTENTION + "linear_q_up_proj.layer_norm_weight",
        when=_has_query_lora,
    ),
    ParameterMapping(
        ATTENTION + "linear_q_up_proj.weight",
        {HF + "self_attn.q_b_proj.weight": ("query", "q_lora")},
        TensorLayout.COLUMN,
        when=_has_query_lora,
    ),
    ParameterMapping(
        ATTENTION + "linear_kv_down_proj.weight",
        {HF + "self_attn.kv_a_proj_with_mqa.weight": ("kv_lora_and_rope", "hidden")},
        TensorLayout.REPLICATED,
    ),
    ParameterMapping(
        ATTENTION + "kv_layernorm.weight",
        {HF + "self_attn.kv_a_layernorm.weight": ("kv_lora",)},
        TensorLayout.REPLICATED,
        te=ATTENTION + "linear_kv_up_proj.layer_norm_weight",
    ),
    ParameterMapping(
        ATTENTION + "linear_kv_up_proj.weight",
        {HF + "self_attn.kv_b_proj.weight": ("key_and_value", "kv_lora")},
        TensorLayout.COLUMN,
    ),
    common.ATTENTION_OUTPUT,
)
_SHARED_EXPERTS = (
    ParameterMapping(
        MCORE + "mlp.shared_experts.linear_fc1.weight",
        {
            HF + "mlp.shared_experts.gate_proj.weight": ("shared_ffn", "hidden"),
            HF + "mlp.shared_experts.up_proj.weight": ("shared_ffn", "hidden"),
        },
        TensorLayout.GATE_UP,
        when=_has_shared_experts,
    ),
    ParameterMapping(
        MCORE + "mlp.shared_experts.linear_fc2.weight",
        {HF + "mlp.shared_experts.down_proj.weight": ("hidden", "shared_ffn")},
        TensorLayout.ROW,
        when=_has_shared_experts,
    ),
)
_EXPERT_BIAS = ParameterMapping(
    MCORE + "mlp.router.expert_bias",
    {HF + "mlp.gate.e_score_correction_bias": ("experts",)},
    TensorLayout.REPLICATED,
    when=common.is_moe,
    is_float32=True,
)
# Latent attention's projections fuse no norm of the layer's input, under either spec.
_INPUT_NORM = ParameterMapping(common.INPUT_NORM.megatron, common.INPUT_NORM.hf, TensorLayout.REPLICATED)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    hf_class="DeepseekV3ForCausalLM",
    layer=(
        *_ATTENTION,
        *common.MLP,
        *common.experts("mlp.experts.{expert}"),
        common.router("mlp.gate.weight"),
        _EXPERT_BIAS,
        *_SHARED_EXPERTS,
        _INPUT_NORM,
        common.POST_ATTENTION_NORM,
        common.POST_ATTENTION_NORM_MOE,
    ),
    rope_types=("default", "yarn"),
    moe_keys={
        "num_experts": ("n_routed_experts",),
        "experts_per_token": ("num_experts_per_tok",),
        "ffn_hidden_size": ("moe_intermediate_size",),
        "num_groups": ("n_group",),
        "top_k_groups": ("topk_group",),
        "routed_scaling_factor": ("routed_scaling_factor",),
    },
    # Megatron-Core always normalises sigmoid scores (moe_utils.py, topk_routing_with_score_function).
    moe_settings={"score_function": "sigmoid", "normalize_top_k": True, "has_expert_bias": True},
    has_latent_attention=True,
    defaults={"first_k_dense_replace": 3, "n_shared_experts": 1},
    only={
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "rms_norm_eps": 1e-6,  # the norms inside latent attention have it in transformers, whatever config.json says
    },
    harmless=frozenset(
        {
            "aux_loss_alpha",
            "ep_size",
            "head_dim",
            "num_key_value_heads",
            "num_nextn_predict_layers",
            "output_router_logits",
            "pretraining_tp",
            "qk_head_dim",
            "seq_aux",
        }
    ),
    # The layers after the last predict further tokens; transformers leaves them unread.
    ignored_tensors=r"model\.layers\.{num_layers}\..*",
)
