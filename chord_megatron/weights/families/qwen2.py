"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from chord_megatron.weights.families import common
from chord_megatron.weights.schema import Family

QWEN2 = Family(
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    layer=(
        common.QKV_WEIGHT,
        common.QKV_BIAS,
        common.ATTENTION_OUTPUT,
        *common.MLP,
        common.INPUT_NORM,
        common.POST_ATTENTION_NORM,
    ),
    qkv_bias=True,
    # Read by transformers only with use_sliding_window, which is refused.
    harmless=frozenset({"sliding_window", "max_window_layers"}),
)
