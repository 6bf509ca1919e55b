"""What drawing completions with the training weights takes beside them: the KV cache, the prompts, the logits."""

from __future__ import annotations

import math

from chord_megatron.config import Config
from chord_megatron.planning.plan import Plan
from chord_megatron.weights.architecture import ModelArchitecture

_FLOAT32 = 4


def rows_at_once(config: Config, plan: Plan) -> int:
    """Completions that a copy of the model decodes together: each data- and context-parallel rank its own."""
    generation_batch = plan.completions_per_step * config.grpo.steps_per_generation
    copies = plan.data_parallel_size * config.parallel.context_parallel_size
    return min(config.rollout.max_batch_size, -(-generation_batch // copies))


def rows_of_cohort(config: Config, plan: Plan) -> int:
    """Of these, what one stage of a pipeline works on at a time (backend/generation.py)."""
    return -(-rows_at_once(config, plan) // config.parallel.pipeline_model_parallel_size)


def cached_numbers(arch: ModelArchitecture) -> int:
    """Numbers of the KV cache for each token and layer: rotated keys, and values (backend/attention.py).

    Latent attention caches those of every head.
    """
    if arch.mla is None:
        return 2 * arch.num_query_groups * arch.head_dim
    return arch.num_attention_heads * (arch.head_dim + arch.mla.v_head_dim)


def kv_cache_bytes(config: Config, arch: ModelArchitecture, plan: Plan, *, layers: int, itemsize: int) -> int:
    """The cache of `layers` layers for the longest rows.

    When rows end, the others of their cohort are copied, a layer at a time (backend/cohort.py).
    """
    length = config.data.max_prompt_length + config.rollout.max_completion_length
    of_row = length * cached_numbers(arch) // config.parallel.tensor_model_parallel_size * itemsize
    return of_row * (rows_at_once(config, plan) * layers + rows_of_cohort(config, plan))


def prefill_bytes(config: Config, arch: ModelArchitecture, plan: Plan, *, itemsize: int) -> int:
    """The widest layer's tensors while the prompts of a cohort are read, each once, and the attention mask.

    In a layer: gate and up, silu(gate), up + 0 and their product, and three times the hidden states; of experts those
    of the tokens that they get, which under TP are those of every rank (no sequence parallelism while decoding). The
    mask, [prompts, length, length], exists three times as bool, and once as numbers in the attention kernel.
    """
    parallel, moe = config.parallel, arch.moe
    prompts = -(-rows_of_cohort(config, plan) // config.rollout.num_generations)
    length = config.data.max_prompt_length
    width = 5 * arch.ffn_hidden_size / parallel.tensor_model_parallel_size
    if moe is not None:
        width = max(width, moe.experts_per_token * (2 * arch.hidden_size + 5 * moe.ffn_hidden_size))
    of_layer = (3 * arch.hidden_size + width) * itemsize
    return math.ceil(prompts * length * (of_layer + (3 + itemsize) * length))


def sampling_bytes(config: Config, arch: ModelArchitecture, plan: Plan, *, itemsize: int) -> int:
    """The logits of one position of a cohort, whole on each rank of the last stage, and what is drawn by.

    sample_tokens (ops/sampling.py) holds log-probs in float32 and probabilities of 8 bytes; beside these the slices
    that they fall into, and what those are computed from; or under top-p and top-k the order of the tokens, sums and
    differences of 8 bytes each, and a mask.
    """
    is_cut = config.rollout.top_p < 1 or config.rollout.top_k
    drawn_by = 3 * 8 + 1 if is_cut else 8 + _FLOAT32
    return rows_of_cohort(config, plan) * arch.vocab_size * (2 * itemsize + _FLOAT32 + 8 + drawn_by)
