"""What training keeps of a micro-batch between its forward and its backward pass, and what a backward pass adds.

The tables below list the tensors that autograd saves in one layer, by the module that saves them. Those of "local",
Megatron-Core's own layers with torch's attention on a CPU, tests/distributed/test_kept_tensors.py holds to autograd;
those of "transformer_engine" were read from its sources (module/layernorm_linear.py, module/grouped_linear.py, dot
product attention: each saves its inputs) and not measured.

The same accounting for Megatron-LM's GPT: Korthikanti et al., arXiv 2205.05198, section 4, where a layer keeps
s b h (10 + 24 / t + 5 a s / (h t)) bytes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch

from chord_megatron.config import ParallelConfig
from chord_megatron.weights.architecture import LatentAttention, MixtureOfExperts, ModelArchitecture

Layers = Literal["local", "transformer_engine"]
# Over TP; over TP under sequence parallelism; as that, with tokens that went where their experts are; not at all.
Split = Literal["heads", "sequence", "experts", "none"]
_FLOAT32, _INT64, _BOOL = 4, 8, 1

# Tokens that the experts of the fullest rank get, over the mean of all ranks: a trained router is not balanced.
FULLEST_EXPERTS = 1.25


class Kept(NamedTuple):
    """One tensor of a layer, or several alike."""

    what: str
    numbers: float  # a token
    itemsize: int  # bytes of one
    split: Split
    module: str = ""  # that it belongs to, where Megatron-Core can compute it again (recompute_modules)


class Kind(NamedTuple):
    """What the tensors of a layer depend on beside the architecture."""

    layers: Layers
    itemsize: int  # bytes of a number of the model's dtype
    longest: int  # tokens of a sequence
    cp: int = 1  # ranks that share each sequence
    recompute: frozenset[str] = frozenset()  # modules that are computed again


def kept_by_layer(arch: ModelArchitecture, *, is_moe: bool, kind: Kind) -> list[Kept]:
    """What one layer keeps for its backward pass where whole layers are not computed again.

    Of modules that are, the input stays, which is what comes before them. Of attention and the up projections of latent
    attention nothing is taken to be saved: a flash kernel keeps no scores.
    """
    attention = _attention(arch, kind) if arch.mla is None else _latent_attention(arch, arch.mla, kind)
    mlp = _mlp("mlp", arch.ffn_hidden_size, kind.itemsize)
    if is_moe and arch.moe is not None:
        mlp = _experts(arch.moe, arch.hidden_size, kind)
    # TransformerEngine has the norm in the projection after it, but for experts and latent attention.
    is_fused = kind.layers == "transformer_engine"
    norms = [
        *_norm("attention", "" if is_fused and arch.mla is None else "layernorm", arch.hidden_size, kind),
        *_norm("MLP", "mlp" if is_fused and not is_moe else "layernorm", arch.hidden_size, kind),
    ]
    return [tensor for tensor in (*norms, *attention, *mlp) if tensor.module not in kind.recompute]


def _norm(what: str, module: str, size: int, kind: Kind) -> list[Kept]:
    """RMSNorm before attention or MLP, and the input of the projection after it.

    torch's is made of float32 operations, which keep theirs.
    """
    if kind.layers == "local" and "layernorm" not in kind.recompute:
        return [
            Kept(f"input of the norm before {what} and the normalised input", 2 * size, _FLOAT32, "sequence"),
            Kept(f"output of the norm before {what}", size, kind.itemsize, "sequence"),
            Kept(f"scale of the norm before {what}", 1, _FLOAT32, "sequence"),
        ]
    return [
        Kept(f"input of the norm before {what}", size, kind.itemsize, "sequence"),
        Kept(f"output of the norm before {what}", size, kind.itemsize, "sequence", module),
        Kept(f"scale of the norm before {what}", 1, _FLOAT32, "sequence", module),
    ]


def _attention(arch: ModelArchitecture, kind: Kind) -> list[Kept]:
    """Grouped-query attention by a flash kernel: queries, keys, values, output and a statistic of each head's row.

    Under context parallelism the local layers keep the keys and values of all ranks, TransformerEngine's ring its own.
    """
    heads, groups, itemsize = arch.num_attention_heads, arch.num_query_groups, kind.itemsize
    query, key = heads * arch.head_dim, groups * arch.head_dim
    of_ranks = kind.cp if kind.layers == "local" else 1
    kept = [
        Kept("cosines and sines of queries and keys", 4 * arch.head_dim, itemsize, "none"),
        Kept("queries, attention's output", 2 * query, itemsize, "heads"),
        Kept("keys, values", 2 * key * of_ranks, itemsize, "heads"),
        Kept("log-sum-exp of the scores", heads, _FLOAT32, "heads"),
    ]
    if kind.layers == "local":
        # SDPA takes sequences of one length together, so that its output is put in order again.
        kept += [Kept("input of the output projection", query, itemsize, "heads"), _places(kind)]
        if kind.cp > 1:  # of one sequence: its two chunks on a rank by what stands before their ends
            kept.append(Kept("masks", kind.longest * (2 * kind.cp + 1) / (4 * kind.cp), itemsize, "none"))
    if arch.qk_layernorm:
        kept += _qk_norms(arch, query, key, kind)
    return kept


def _places(kind: Kind) -> Kept:
    """Of tokens in their sequences: of queries and of what they attend to, and back."""
    return Kept("places of the sequences", 2 + kind.cp, _INT64, "none")


def _qk_norms(arch: ModelArchitecture, query: int, key: int, kind: Kind) -> list[Kept]:
    """Their outputs are rotated next, which keeps none of them."""
    heads = arch.num_attention_heads + arch.num_query_groups
    scales = Kept("scales of the norms of queries and keys", heads, _FLOAT32, "heads")
    if kind.layers == "transformer_engine":
        return [Kept("inputs of the norms of queries and keys", query + key, kind.itemsize, "heads"), scales]
    # In float32 the input is a view of the projection's output, which stays as a whole; with one group on a rank, or
    # one query a group, the queries are a view of it, too, and take nothing more.
    keys_in = query + 2 * key if kind.itemsize == _FLOAT32 else key
    return [
        Kept("inputs of the norms of queries and keys", query + keys_in, _FLOAT32, "heads"),
        Kept("normalised queries and keys", query + key, _FLOAT32, "heads"),
        scales,
    ]


def _latent_attention(arch: ModelArchitecture, mla: LatentAttention, kind: Kind) -> list[Kept]:
    """Multi-head latent attention; the down projections work on a rank's share of the sequence.

    torch has no flash kernel for values of another size than keys on a CPU: scores are kept, everything in float32, and
    under context parallelism the values of all ranks, and the keys up to the end of each of a rank's two chunks.
    """
    heads, rope, itemsize, cp = arch.num_attention_heads, mla.qk_rope_head_dim, kind.itemsize, kind.cp
    query, value = heads * (mla.qk_nope_head_dim + rope), heads * mla.v_head_dim
    is_gathered = cp > 1 and kind.layers == "local"
    seen = (2 * cp + 1) / 2 if is_gathered else 1.0
    in_attention = _FLOAT32 if kind.layers == "local" else itemsize
    kept = [
        Kept("cosines and sines of queries and keys", 4 * rope, itemsize, "none"),
        Kept("queries", query, in_attention, "heads"),
        Kept("keys", query * seen, in_attention, "heads"),
        Kept("values", value * (cp if is_gathered else 1), in_attention, "heads"),
        Kept("input of the output projection", value, itemsize, "heads"),
        *_latent_norm("query latents", mla.q_lora_rank or 0, mla.q_lora_rank or 0, kind),
        *_latent_norm("key/value latents", mla.kv_lora_rank, mla.kv_lora_rank + rope, kind),
    ]
    if kind.layers == "transformer_engine":
        return [*kept, Kept("log-sum-exp of the scores", heads, _FLOAT32, "heads")]
    of_length = seen / (2 * cp) if cp > 1 else 1.0
    return [*kept, Kept("scores", heads * kind.longest * of_length, in_attention, "heads"), _places(kind)]


def _latent_norm(where: str, size: int, whole: int, kind: Kind) -> list[Kept]:
    """whole: numbers of the tensor that the norm's input is a part of."""
    if not size:
        return []
    inputs = Kept(f"input of the norm of the {where}", whole, kind.itemsize, "sequence")
    output = Kept(f"output of the norm of the {where}", size, kind.itemsize, "sequence")
    scale = Kept(f"scale of the norm of the {where}", 1, _FLOAT32, "sequence")
    if kind.layers == "transformer_engine":
        return [inputs, output, scale]
    float_input = inputs if kind.itemsize == _FLOAT32 else inputs._replace(numbers=size, itemsize=_FLOAT32)
    return [float_input, Kept(f"normalised {where}", size, _FLOAT32, "sequence"), output, scale]


def _mlp(module: str, ffn: int, itemsize: int) -> list[Kept]:
    """A gated MLP in separate operations (megatron/core/transformer/mlp.py, `glu`)."""
    return [
        Kept(f"{module}: gate and up", 2 * ffn, itemsize, "heads", module),
        Kept(f"{module}: silu(gate), up + 0, their product", 3 * ffn, itemsize, "heads", module),
    ]


def _experts(moe: MixtureOfExperts, hidden: int, kind: Kind) -> list[Kept]:
    """Routed experts, whole on their ranks, which see a share of the sequence; and those that see every token."""
    chosen, ffn, experts = moe.experts_per_token, moe.ffn_hidden_size, moe.num_experts
    kept = [
        Kept("tokens of the experts", chosen * hidden, kind.itemsize, "experts"),
        Kept("experts: gate and up", 2 * chosen * ffn, kind.itemsize, "experts"),
        Kept(
            "experts: silu(gate), up + 0, their product, weighted",
            4 * chosen * ffn,
            kind.itemsize,
            "experts",
            "moe_act",
        ),
        Kept("experts chosen, and places of their tokens", 2 * chosen, _INT64, "sequence"),
        Kept("weights of the experts chosen", chosen, _FLOAT32, "sequence"),
        Kept("weights of all experts", experts, _FLOAT32, "sequence"),
        Kept("which expert has the token", experts, _BOOL, "sequence"),
    ]
    # Megatron-Core's topk_routing_with_score_function: what comes before and after the choice.
    if moe.normalize_top_k:
        kept.append(Kept("scores of the experts chosen", chosen, _FLOAT32, "sequence"))
    if moe.score_function == "sigmoid" or not moe.normalize_top_k:
        kept.append(Kept("scores of all experts", experts, _FLOAT32, "sequence"))
    if moe.score_function == "sigmoid":
        kept.append(Kept("sum of the chosen scores", 1, _FLOAT32, "sequence"))
    if moe.num_groups is not None and moe.top_k_groups is not None:
        best = moe.num_groups * (chosen // moe.top_k_groups) + moe.top_k_groups
        kept.append(Kept("best experts of each group, best groups", best, _INT64, "sequence"))
        kept.append(Kept("experts outside of the best groups", experts, _BOOL, "sequence"))
    shared = moe.shared_ffn_hidden_size
    kept += _mlp("shared_experts", shared, kind.itemsize) if shared else []
    return [] if "moe" in kind.recompute else kept


def layer_bytes(arch: ModelArchitecture, parallel: ParallelConfig, *, is_moe: bool, kind: Kind) -> float:
    """What a rank keeps of one layer for each of its tokens, [bytes], without recomputation."""
    return sum(size * share_of(split, parallel) for split, size in _bytes_by_split(arch, is_moe, kind).items())


@lru_cache(maxsize=256)
def _bytes_by_split(arch: ModelArchitecture, is_moe: bool, kind: Kind) -> dict[Split, float]:
    sizes: dict[Split, float] = {}
    for tensor in kept_by_layer(arch, is_moe=is_moe, kind=kind):
        sizes[tensor.split] = sizes.get(tensor.split, 0.0) + tensor.numbers * tensor.itemsize
    return sizes


def share_of(split: Split, parallel: ParallelConfig) -> float:
    """Which part of a tensor one rank holds, on average; for experts, the rank that holds most."""
    tp = parallel.tensor_model_parallel_size
    of_sequence = 1 / tp if parallel.sequence_parallel else 1.0
    crowding = FULLEST_EXPERTS if parallel.expert_model_parallel_size > 1 else 1.0
    return {"heads": 1 / tp, "sequence": of_sequence, "experts": of_sequence * crowding, "none": 1.0}[split]


def chunks_in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> list[int]:
    """Micro-batches whose forward pass is done and whose backward pass is not, at most, of each chunk of a stage.

    stage: pipeline rank. Source: get_pp_rank_microbatches (megatron/core/pipeline_parallel/schedules.py): so many
    forward passes before the first backward pass, and one more.
    """
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    warm_up = pp - stage - 1
    if chunks > 1:
        warm_up = 2 * warm_up + (chunks - 1) * pp
    counts = [0] * chunks
    for unit in range(min(warm_up + 1, micro_batches * chunks)):
        counts[unit // pp % chunks if chunks > 1 else 0] += 1
    return counts


def backward_bytes(arch: ModelArchitecture, parallel: ParallelConfig, *, is_moe: bool, kind: Kind, tokens: int) -> int:
    """What the backward pass of one layer needs beside what is kept, at its worst moment, in the MLP.

    The gradients of silu(gate) and up exist beside the gradient of their product, and the residual stream's beside
    that of the norm's input; under sequence parallelism, whole in the buffer that sequences are gathered in and in the
    gradient before it is scattered (LinearWithGradAccumulationAndAsyncCommunication). A weight gradient exists in the
    model's dtype before it is added to the float32 sum.
    """
    tp, hidden, moe = parallel.tensor_model_parallel_size, arch.hidden_size, arch.moe
    streams, width = 2 * hidden * share_of("sequence", parallel), arch.ffn_hidden_size / tp
    weight = 2 * width * hidden
    if is_moe and moe is not None:
        routed = moe.experts_per_token * share_of("experts", parallel)
        streams, width = streams + 2 * routed * hidden, routed * moe.ffn_hidden_size
        weight = 2 * moe.ffn_hidden_size * hidden
        if kind.layers == "transformer_engine":  # a grouped multiplication makes those of all its experts
            weight *= moe.num_experts / parallel.expert_model_parallel_size
    gathered = 2 * hidden if parallel.sequence_parallel and tp > 1 else 0
    return math.ceil(kind.itemsize * (tokens * (2 * width + streams + gathered) + weight))


def layers_here() -> Layers:
    """Those that a run on this machine would have (backend/acceleration.py)."""
    is_there = torch.cuda.is_available() and find_spec("transformer_engine") is not None
    return "transformer_engine" if is_there else "local"
