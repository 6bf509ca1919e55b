"""Which layers a pipeline stage holds: the one answer that planning, the model and the checkpoints go by."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import lru_cache

from chord_megatron.config import ParallelConfig
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import shown
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.mapping import hf_shapes, mapped_parameters


@dataclass(frozen=True)
class PartCosts:
    """Multiplications of one token's forward pass; the backward pass takes twice as many of each."""

    embedding: float
    layer: float  # the mean of the layers
    head: float


@lru_cache(maxsize=8)
def part_costs(arch: ModelArchitecture) -> PartCosts:
    """What a token costs in each part of the model: the weights that it meets (vectors, too: they are few).

    Of the experts it meets those that it is routed to. An embedding is looked up: a row is read. Attention between
    tokens, which grows with their number, is left out: a few per cent of a layer up to some thousand tokens.
    """
    active = arch.moe.experts_per_token / arch.moe.num_experts if arch.moe else 1.0
    of_layers = sum(
        math.prod(shape) * (1.0 if parameter.expert is None else active)
        for parameter in mapped_parameters(arch)
        if parameter.layer is not None
        for shape in hf_shapes(parameter, arch).values()
    )
    return PartCosts(arch.hidden_size, of_layers / arch.num_layers, arch.hidden_size * arch.vocab_size)


def attention_length(arch: ModelArchitecture) -> float:
    """Tokens of a sequence at which attention between them costs as much as all the weights of a layer.

    A token meets half of the sequence before it: a multiplication for each number of its queries, and of its values.
    """
    heads, mla = arch.num_attention_heads, arch.mla
    query, value = (
        (arch.head_dim, arch.head_dim) if mla is None else (mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.v_head_dim)
    )
    return part_costs(arch).layer / (heads * (query + value) / 2)


def stage_layers(parallel: ParallelConfig, arch: ModelArchitecture) -> list[int]:
    """How many layers each stage holds, [PP x VPP], in the order of the layers.

    Under VPP these are virtual stages: entry i is chunk i // PP of pipeline rank i % PP. Raises UserError where the
    model cannot be cut so.
    """
    stages = num_stages(parallel)
    _refuse_too_many(parallel, arch)
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if first is not None or last is not None:
        return _as_megatron_cuts(parallel, arch)
    if isinstance(parallel.pipeline_layout, list):
        return _checked(parallel.pipeline_layout, parallel, arch)
    if is_cut_by_cost(parallel, arch):
        return [*balanced(arch.num_layers, stages, part_costs(arch))]
    return [arch.num_layers // stages] * stages


def is_cut_by_cost(parallel: ParallelConfig, arch: ModelArchitecture) -> bool:
    """Whether the stages get layers by what they cost: where that is asked for, or no even cut exists."""
    if parallel.num_layers_in_first_pipeline_stage or parallel.num_layers_in_last_pipeline_stage:
        return False
    layout = parallel.pipeline_layout
    return layout == "auto" or (layout is None and arch.num_layers % num_stages(parallel) != 0)


def num_stages(parallel: ParallelConfig) -> int:
    """Stages that follow one another: PP x VPP."""
    return parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)


@lru_cache(maxsize=1024)
def balanced(num_layers: int, stages: int, costs: PartCosts) -> tuple[int, ...]:
    """Layers of each stage such that the dearest one is as cheap as can be, and the others as even.

    Each layer goes where there is least so far, among equals to the last: early stages hold the activations of more
    micro-batches (1F1B). The first stage begins with the embedding's cost, the last one with the head's.
    """
    start = [0.0] * stages
    start[0] += costs.embedding
    start[-1] += costs.head
    held = [0] * stages
    queue = [(cost, -stage) for stage, cost in enumerate(start)]
    heapq.heapify(queue)
    for _ in range(num_layers):
        cost, stage = queue[0]
        held[-stage] += 1
        heapq.heapreplace(queue, (cost + costs.layer, stage))
    return tuple(held)


def _refuse_too_many(parallel: ParallelConfig, arch: ModelArchitecture) -> None:
    """The first stage may hold the embedding alone, the last one the head; every other needs a layer."""
    stages, most = num_stages(parallel), arch.num_layers + 2
    if stages > most:
        raise UserError(
            f"{_key(parallel)}={stages} stages are more than the model's {arch.num_layers} layers fill; "
            f"choose at most {most}"
        )


def _checked(layout: list[int], parallel: ParallelConfig, arch: ModelArchitecture) -> list[int]:
    key, stages = "parallel.pipeline_layout", num_stages(parallel)
    if len(layout) != stages:
        raise UserError(
            f"{key} has {len(layout)} entries, but {_key(parallel)} makes {stages} stages; give the layers of each"
        )
    if sum(layout) != arch.num_layers:
        raise UserError(
            f"{key}={shown(layout)} adds up to {sum(layout)} layers, but the model has {arch.num_layers}; mend it"
        )
    if 0 in layout[1:-1]:
        raise UserError(
            f"{key}={shown(layout)} leaves stage {1 + layout[1:-1].index(0)} (of 0 to {stages - 1}) without a layer, "
            "which only the first and the last may be; give it one"
        )
    return layout


def _as_megatron_cuts(parallel: ParallelConfig, arch: ModelArchitecture) -> list[int]:
    """What Megatron-Core makes of num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage.

    They count the layers of a pipeline rank over all its chunks, each of which gets the same number; the other ranks
    share the rest evenly (get_num_layers_to_build in transformer/transformer_block.py).
    """
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    given = {
        f"num_layers_in_{which}_pipeline_stage": layers
        for which, layers in (("first", first), ("last", last))
        if layers is not None
    }
    key = "parallel." + " and ".join(f"{name}={layers}" for name, layers in given.items())
    if parallel.pipeline_layout is not None:
        raise UserError(f"{key} cannot stand beside parallel.pipeline_layout, which says it all; set one of them")
    if pp == 1:
        raise UserError(f"{key} without a pipeline; remove it, or set parallel.pipeline_model_parallel_size above 1")
    if sum(given.values()) > arch.num_layers:
        raise UserError(f"{key} wants {sum(given.values())} layers, but the model has {arch.num_layers}; lower it")
    left, others = arch.num_layers - sum(given.values()), pp - len(given)
    share, rest = divmod(left, others) if others else (vpp, left)
    ranks = [first or share, *[share] * (pp - 2), last or share]
    if rest or share < 1 or any(layers % vpp for layers in ranks):
        raise UserError(
            f"{key} leaves {left} of the model's {arch.num_layers} layers to {others} other stages"
            + f" (chunks of a stage: {vpp})" * (vpp > 1)
            + ", which is no even cut; set parallel.pipeline_layout"
        )
    return [layers // vpp for layers in ranks] * vpp


def _key(parallel: ParallelConfig) -> str:
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return "parallel.pipeline_model_parallel_size" + " x virtual_pipeline_model_parallel_size" * interleaved
