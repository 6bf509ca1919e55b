"""What drawing completions with the training weights takes beside them: the KV cache, the prompts, the logits."""

from __future__ import annotations

import math

from chord_megatron.config import Config
from chord_megatron.planning.plan import Plan
from chord_megatron.weights.architecture import ModelArchitecture

_FLOAT32 = 4


def rows_at_once(config: Config, plan: Plan) -> int:
    """Completions that a data-parallel rank decodes together (rollout/embedded.py)."""
    generation_batch = plan.completions_per_step * config.grpo.steps_per_generation
    return min(config.rollout.max_batch_size, -(-generation_batch // plan.data_parallel_size))


def cached_numbers(arch: ModelArchitecture) -> int:
    """Numbers of the KV cache for each token and layer: rotated keys, and values (backend/attention.py).

    Latent attention caches those of every head.
    """
    if arch.mla is None:
        return 2 * arch.num_query_groups * arch.head_dim
    return arch.num_attention_heads * (arch.head_dim + arch.mla.v_head_dim)


def kv_cache_bytes(config: Config, arch: ModelArchitecture, plan: Plan, *, layers: int, itemsize: int) -> int:
    """The cache of `layers` layers for the longest rows.

    Twice, but for one row: when a row ends, the others are copied before the old cache is given back
    (_Decoder.keep_rows in backend/generation.py).
    """
    rows = rows_at_once(config, plan)
    length = config.data.max_prompt_length + config.rollout.max_completion_length
    numbers = cached_numbers(arch) * layers // config.parallel.tensor_model_parallel_size
    return (2 * rows - 1) * length * numbers * itemsize


def prefill_bytes(config: Config, arch: ModelArchitecture, plan: Plan, *, itemsize: int) -> int:
    """The widest layer's tensors while all prompts are read at once, and the attention mask.

    In a layer: gate and up, silu(gate), up + 0 and their product, and three times the hidden states; of experts those
    of the tokens that they get, which under TP are those of every rank (no sequence parallelism while decoding). The
    mask, [rows, length, length], exists three times as bool, and once as numbers in the attention kernel.
    """
    parallel, moe = config.parallel, arch.moe
    rows, length = rows_at_once(config, plan), config.data.max_prompt_length
    width = 5 * arch.ffn_hidden_size / parallel.tensor_model_parallel_size
    if moe is not None:
        width = max(width, moe.experts_per_token * (2 * arch.hidden_size + 5 * moe.ffn_hidden_size))
    of_layer = (3 * arch.hidden_size + width) * itemsize
    return math.ceil(rows * length * (of_layer + (3 + itemsize) * length))


def sampling_bytes(config: Config, arch: ModelArchitecture, plan: Plan, *, itemsize: int) -> int:
    """The logits of one position of all rows, whole on each rank of the last stage, and what is drawn by.

    sample_tokens (ops/sampling.py) holds log-probs in float32, sorted probabilities, their order, sums and differences
    of 8 bytes each, and a mask.
    """
    return rows_at_once(config, plan) * arch.vocab_size * (itemsize + _FLOAT32 + 4 * 8 + 1)
