"""Mistral 7B from v0.2 on, Nemo, Small: Llama's tensors. v0.1 has a sliding window, which is refused."""

from chord_megatron.weights.families.llama import LLAMA
from chord_megatron.weights.schema import Family

MISTRAL = Family(
    name="mistral",
    hf_class="MistralForCausalLM",
    layer=LLAMA.layer,
    defaults={"sliding_window": 4096},
)
