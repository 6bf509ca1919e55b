"""Llama 2, 3, 3.1, 3.2, 3.3: grouped-query attention without biases, llama3 RoPE scaling from 3.1 on."""

from chord_megatron.weights.families import common
from chord_megatron.weights.schema import Family

LLAMA = Family(
    name="llama",
    hf_class="LlamaForCausalLM",
    layer=(
        common.QKV_WEIGHT,
        common.ATTENTION_OUTPUT,
        *common.MLP,
        common.INPUT_NORM,
        common.POST_ATTENTION_NORM,
    ),
    harmless=frozenset({"pretraining_tp"}),
)
