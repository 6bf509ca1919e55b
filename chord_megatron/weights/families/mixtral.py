"""Mixtral: Mistral's attention; experts, named w1, w3, w2, in every layer."""

from chord_megatron.weights.families import common
from chord_megatron.weights.schema import Family

MIXTRAL = Family(
    name="mixtral",
    hf_class="MixtralForCausalLM",
    layer=(
        common.QKV_WEIGHT,
        common.ATTENTION_OUTPUT,
        common.router("block_sparse_moe.gate.weight"),
        *common.experts("block_sparse_moe.experts.{expert}", gate="w1", up="w3", down="w2"),
        common.INPUT_NORM,
        common.POST_ATTENTION_NORM_MOE,
    ),
    moe_keys={
        "num_experts": ("num_local_experts",),
        "experts_per_token": ("num_experts_per_tok",),
        "ffn_hidden_size": ("intermediate_size",),
    },
    moe_settings={"score_function": "softmax", "normalize_top_k": True},
    defaults={"rope_theta": 1000000.0},
    harmless=frozenset({"router_aux_loss_coef", "output_router_logits"}),
)
