"""The model families: one file of data each. docs/adding-a-model.md shows how to add one."""

from chord_megatron.weights.families.deepseek_v3 import DEEPSEEK_V3
from chord_megatron.weights.families.llama import LLAMA
from chord_megatron.weights.families.mistral import MISTRAL
from chord_megatron.weights.families.mixtral import MIXTRAL
from chord_megatron.weights.families.qwen2 import QWEN2
from chord_megatron.weights.families.qwen3 import QWEN3
from chord_megatron.weights.families.qwen3_moe import QWEN3_MOE

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, DEEPSEEK_V3)}
