"""What the ranks of a layout send one another, by kind of parallelism: bytes of a message, how many, how long.

Bytes are those that one GPU sends. A ring over n ranks sends (n - 1) / n of a tensor for an all-gather or a
reduce-scatter, and twice that for an all-reduce; an all-to-all sends (n - 1) / n of a rank's part. Which collectives a
layer makes: Korthikanti et al., arXiv 2205.05198, section 4.2, and Megatron-Core's tensor_parallel/layers.py, where the
backward pass gathers a linear layer's input again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from chord_megatron.config import Config
from chord_megatron.planning.activations import FULLEST_EXPERTS
from chord_megatron.planning.decoding_memory import cached_numbers
from chord_megatron.planning.gpus import Assumptions, Cluster
from chord_megatron.planning.memory import stage_parameters
from chord_megatron.planning.plan import Plan
from chord_megatron.weights.architecture import ModelArchitecture

_FLOAT32 = 4


@dataclass(frozen=True)
class Message:
    """One kind of message of one GPU in one optimizer step, or in the part of it that is spoken of."""

    parallelism: str  # TP, CP, EP, PP, DP
    what: str
    nbytes: float  # sent in one
    count: float
    link: str  # NVLink or network
    seconds: float  # of one

    @property
    def total_seconds(self) -> float:
        return self.count * self.seconds

    @property
    def total_bytes(self) -> float:
        return self.count * self.nbytes

    def times(self, factor: float) -> Message:
        """That many more of it."""
        return replace(self, count=self.count * factor)


@dataclass(frozen=True)
class Links:
    """How long messages take in this cluster, under these assumptions."""

    cluster: Cluster
    assumptions: Assumptions

    def message(self, parallelism: str, what: str, nbytes: float, count: float, *, within_node: bool) -> Message:
        """`within_node`: whether all the ranks that take part are in one node."""
        gpu, assumed = self.cluster.gpu, self.assumptions
        rate, latency = gpu.network_gb_per_s, assumed.network_latency
        if within_node:
            rate, latency = gpu.nvlink_gb_per_s, assumed.nvlink_latency
        seconds = latency + nbytes / (1e9 * rate * assumed.link_share)
        return Message(parallelism, what, nbytes, count, "NVLink" if within_node else "network", seconds)


def layer_messages(
    config: Config, arch: ModelArchitecture, links: Links, *, tokens: float, is_moe: bool, backward: bool
) -> list[Message]:
    """Of one layer for one micro-batch: its forward pass, or its backward pass with what is recomputed in it.

    tokens: of the micro-batch, over all ranks that share the model.
    """
    forward = _layer_pass(config, arch, links, tokens=tokens, is_moe=is_moe, backward=False)
    if not backward:
        return forward
    again = forward if config.model.recomputes_layers else []
    return [*again, *_layer_pass(config, arch, links, tokens=tokens, is_moe=is_moe, backward=True)]


def _layer_pass(
    config: Config, arch: ModelArchitecture, links: Links, *, tokens: float, is_moe: bool, backward: bool
) -> list[Message]:
    parallel = config.parallel
    cp = parallel.context_parallel_size
    messages = _tensor_parallel(config, arch, links, tokens=tokens / cp, is_moe=is_moe, backward=backward)
    if cp > 1:
        messages += _context_parallel(config, arch, links, tokens=tokens, backward=backward)
    if is_moe and parallel.expert_model_parallel_size > 1:
        messages += _expert_parallel(config, arch, links, tokens / cp)
    return messages


def _tensor_parallel(
    config: Config, arch: ModelArchitecture, links: Links, *, tokens: float, is_moe: bool, backward: bool
) -> list[Message]:
    """All-gather into and reduce-scatter out of attention and MLP; without sequence parallelism an all-reduce."""
    tp, mla, moe = config.parallel.tensor_model_parallel_size, arch.mla, arch.moe
    if tp == 1:
        return []
    of_number = tokens * _itemsize(config) * (tp - 1) / tp
    gathered, hidden = arch.hidden_size, arch.hidden_size
    if mla is not None:  # the latents are gathered in place of hidden states
        gathered = (mla.q_lora_rank or hidden) + mla.kv_lora_rank + mla.qk_rope_head_dim
    has_mlp = not is_moe or (moe is not None and moe.shared_ffn_hidden_size is not None)
    widths = [(gathered, hidden), *([(hidden, hidden)] if has_mlp else [])]
    if not config.parallel.sequence_parallel:
        numbers = 2 * hidden * of_number
        return [links.message("TP", "all-reduce of a layer", numbers, len(widths), within_node=True)]
    messages = []
    for into, out in widths:
        gathers = [out, into] if backward else [into]
        messages += [links.message("TP", "all-gather of a layer", w * of_number, 1, within_node=True) for w in gathers]
        scattered = (into if backward else out) * of_number
        messages.append(links.message("TP", "reduce-scatter of a layer", scattered, 1, within_node=True))
    return messages


def _context_parallel(
    config: Config, arch: ModelArchitecture, links: Links, *, tokens: float, backward: bool
) -> list[Message]:
    """Keys and values of the other ranks; TransformerEngine's ring sends them backward again, with their gradients."""
    tp, cp = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    within_node = links.cluster.within_node(stride=tp, size=cp)
    nbytes = tokens * cached_numbers(arch) / tp * _itemsize(config) * (cp - 1) / cp
    count = 2 if backward else 1
    return [links.message("CP", "keys and values of a layer", nbytes, count, within_node=within_node)]


def _expert_parallel(config: Config, arch: ModelArchitecture, links: Links, tokens: float) -> list[Message]:
    """Tokens to their experts and back; of ranks on several nodes, what leaves the node, which takes longest."""
    assert arch.moe is not None
    parallel, per_node = config.parallel, links.cluster.gpus_per_node
    ep, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    within_node = links.cluster.within_node(stride=1, size=ep)
    elsewhere = (ep - 1 if within_node else ep - min(ep, per_node)) / ep
    routed = tokens / tp * arch.moe.experts_per_token * FULLEST_EXPERTS
    nbytes = routed * arch.hidden_size * _itemsize(config) * elsewhere
    return [links.message("EP", "all-to-all of a layer", nbytes, 2, within_node=within_node)]


def head_messages(config: Config, arch: ModelArchitecture, links: Links, *, tokens: float) -> list[Message]:
    """Of the head for one micro-batch's `tokens` that count: rows gathered twice, their gradients summed in float32."""
    tp = config.parallel.tensor_model_parallel_size
    if tp == 1:
        return []
    numbers = tokens / config.parallel.context_parallel_size * arch.hidden_size * (tp - 1) / tp
    if not config.parallel.sequence_parallel:
        return [links.message("TP", "all-reduce of the head", 2 * numbers * _FLOAT32, 1, within_node=True)]
    return [
        links.message("TP", "rows of the head", numbers * _itemsize(config), 2, within_node=True),
        links.message("TP", "gradients of the head", numbers * _FLOAT32, 1, within_node=True),
    ]


def stage_messages(config: Config, arch: ModelArchitecture, links: Links, *, tokens: float) -> list[Message]:
    """Hidden states to the next stage and their gradients back, for one micro-batch and all chunks of a stage."""
    parallel = config.parallel
    if parallel.pipeline_model_parallel_size == 1:
        return []
    of_sequence = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    shares = parallel.context_parallel_size * of_sequence
    nbytes = tokens / shares * arch.hidden_size * _itemsize(config)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    # Stages are the outermost dimension of the ranks (the order "tp-cp-ep-dp-pp" of initialize_model_parallel).
    within_node = links.cluster.is_one_node
    return [links.message("PP", "hidden states, or their gradients", nbytes, 2 * chunks, within_node=within_node)]


def data_parallel_messages(config: Config, arch: ModelArchitecture, links: Links, plan: Plan) -> list[Message]:
    """Sums of the gradients and, with the distributed optimizer, the parameters back; of the fullest stage."""
    parallel, is_sharded = config.parallel, config.optimizer.use_distributed_optimizer
    tp, cp, ep = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
    )
    held = max(stage_parameters(arch, parallel), key=sum)
    ranks_of_stage = plan.world_size // parallel.pipeline_model_parallel_size
    messages = []
    for name, count, size, stride in (
        ("", held.dense, plan.data_parallel_size * cp, tp),
        (" of experts", held.expert, ranks_of_stage // ep, ep),
    ):
        if size == 1 or not count:
            continue
        within_node = links.cluster.within_node(stride=stride, size=size)
        numbers = count * (size - 1) / size
        if not is_sharded:
            what, nbytes = f"all-reduce of gradients{name}", 2 * numbers * _FLOAT32
            messages.append(links.message("DP", what, nbytes, 1, within_node=within_node))
            continue
        sums, parameters = numbers * _FLOAT32, numbers * _itemsize(config)
        messages += [
            links.message("DP", f"reduce-scatter of gradients{name}", sums, 1, within_node=within_node),
            links.message("DP", f"all-gather of parameters{name}", parameters, 1, within_node=within_node),
        ]
    return messages


def seconds_of(messages: Iterable[Message]) -> float:
    """Of all of them, one after the other."""
    return sum(message.total_seconds for message in messages)


def merged(messages: Iterable[Message]) -> list[Message]:
    """Those of one kind and size together."""
    counts: dict[Message, float] = {}
    for message in messages:
        one = replace(message, count=1)
        counts[one] = counts.get(one, 0.0) + message.count
    return [replace(message, count=count) for message, count in counts.items()]


def _itemsize(config: Config) -> int:
    return getattr(torch, config.model.dtype).itemsize
