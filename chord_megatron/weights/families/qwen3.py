"""Qwen3: norms on the query and key heads, head_dim of its own."""

from chord_megatron.weights.families import common
from chord_megatron.weights.families.qwen2 import QWEN2
from chord_megatron.weights.schema import Family

QWEN3 = Family(
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    layer=(
        common.QKV_WEIGHT,
        common.ATTENTION_OUTPUT,
        *common.QK_NORMS,
        *common.MLP,
        common.INPUT_NORM,
        common.POST_ATTENTION_NORM,
    ),
    qk_layernorm=True,
    defaults={"head_dim": 128},
    only={"use_qk_norm": True},
    harmless=QWEN2.harmless,
)
