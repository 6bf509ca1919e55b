"""Qwen3-MoE: Qwen3's attention; experts in all layers but `mlp_only_layers`."""

from chord_megatron.weights.families import common
from chord_megatron.weights.families.qwen2 import QWEN2
from chord_megatron.weights.schema import Family

QWEN3_MOE = Family(
    name="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    layer=(
        common.QKV_WEIGHT,
        common.ATTENTION_OUTPUT,
        *common.QK_NORMS,
        *common.MLP,
        *common.experts("mlp.experts.{expert}"),
        common.router("mlp.gate.weight"),
        common.INPUT_NORM,
        common.POST_ATTENTION_NORM,
        common.POST_ATTENTION_NORM_MOE,
    ),
    qk_layernorm=True,
    moe_keys={
        "num_experts": ("num_experts", "num_local_experts"),  # transformers 4, transformers 5
        "experts_per_token": ("num_experts_per_tok",),
        "ffn_hidden_size": ("moe_intermediate_size",),
        "normalize_top_k": ("norm_topk_prob",),
    },
    moe_settings={"score_function": "softmax"},
    defaults={"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 1},
    only={"use_qk_norm": True},
    harmless=QWEN2.harmless | {"router_aux_loss_coef", "output_router_logits"},
)
