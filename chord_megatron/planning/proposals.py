"""All layouts of a configuration on so many GPUs: those that are refused, do not fit, or fit, and how fast those are.

Sequence parallelism goes with TP, and the distributed optimizer with several data-parallel ranks, or where it is
configured: both send no more than without, and hold less.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from chord_megatron.algorithm.presets import SEMANTICS
from chord_megatron.config import Config
from chord_megatron.planning.batches import counts_rows, expert_max_length
from chord_megatron.planning.gpus import Assumptions, Cluster
from chord_megatron.planning.layout import check_layout
from chord_megatron.planning.memory import export_bytes
from chord_megatron.planning.plan import Plan, make_plan
from chord_megatron.planning.rank_memory import RankMemory, rank_memories
from chord_megatron.planning.recomputation import check_recomputation
from chord_megatron.planning.step_time import StepEstimate, estimate_step
from chord_megatron.planning.workload import longest_row
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture

_ABOUT_AS_FAST, _ROOMY = 1.03, 0.9
# Context parallelism leaves a rank at least so many tokens of the longest row: with few, matrices are small, which the
# estimate of time does not know. Llama 3 has 8192 (arXiv 2407.21783, table 4).
_FEWEST_TOKENS = 4096


@dataclass(frozen=True)
class Layout:
    """A configuration under one layout, and what comes of it."""

    config: Config
    plan: Plan
    stages: list[RankMemory]  # a rank of each

    @property
    def fullest(self) -> RankMemory:
        return max(self.stages, key=lambda rank: rank.peak)

    @property
    def name(self) -> str:
        """As tables and sentences have it."""
        parallel = self.config.parallel
        sizes = [
            ("TP", parallel.tensor_model_parallel_size),
            ("PP", parallel.pipeline_model_parallel_size),
            ("VPP", parallel.virtual_pipeline_model_parallel_size or 1),
            ("CP", parallel.context_parallel_size),
            ("EP", parallel.expert_model_parallel_size),
            ("DP", self.plan.data_parallel_size),
        ]
        always = ("TP", "PP", "DP")
        shown = " x ".join(f"{name} {size}" for name, size in sizes if size > 1 or name in always)
        return shown + ", recomputation" * self.config.model.recomputes_layers


@dataclass(frozen=True)
class Proposal:
    """A layout that fits."""

    layout: Layout
    step: StepEstimate
    changed_rows: bool  # train.global_batch_size had to be another


@dataclass(frozen=True)
class Search:
    """What was found."""

    proposals: list[Proposal]  # those that keep the batch first, of these the fastest
    best: Proposal
    too_large: list[Layout]  # the smallest first
    refused: Counter[str]  # sentences of the rules, and how many layouts break each
    usable: int  # bytes of a GPU

    @property
    def tried(self) -> int:
        return len(self.proposals) + len(self.too_large) + self.refused.total()


def search(config: Config, arch: ModelArchitecture, cluster: Cluster, assumptions: Assumptions) -> Search:
    """Try all layouts. Raises UserError where none fits."""
    usable = int(assumptions.usable_memory * cluster.gpu.memory)
    check_recomputation(config.model, arch)  # which the layouts change
    _check_sampler(config, arch, cluster)
    attempt = _Attempt(config, arch, cluster)
    fitting: list[Layout] = []
    too_large: list[Layout] = []
    refused = Counter[str]()
    for sizes in _sizes(arch, cluster, longest_row(config, expert_max_length(config, arch))):
        try:
            smallest = [attempt.lay_out(sizes, cut, recompute=True) for cut in _cuts(arch, sizes, 1)]
        except UserError as error:
            refused[str(error)] += 1
            continue
        if min(layout.fullest.peak for layout in smallest) > usable:
            too_large += smallest  # without recomputation and with more chunks, a stage keeps more
            continue
        for cut in _cuts(arch, sizes, arch.num_layers):
            for layout in (attempt.lay_out(sizes, cut, recompute=recompute) for recompute in (False, True)):
                (fitting if layout.fullest.peak <= usable else too_large).append(layout)
    too_large.sort(key=lambda layout: layout.fullest.peak)
    if not fitting:
        raise UserError(_why_none(too_large, refused, cluster, usable))
    proposals = [_propose(layout, config, arch, cluster, assumptions) for layout in fitting]
    proposals.sort(key=lambda proposal: (proposal.changed_rows, proposal.step.time.total))
    return Search(proposals, _best(proposals, usable), too_large, refused, usable)


def _best(proposals: list[Proposal], usable: int) -> Proposal:
    """The fastest with room to spare of those that are about as fast as the fastest; without any, what holds least.

    About as fast: in what differs between layouts, which drawing completions elsewhere and updating weights do not.
    """
    common = min(proposal.step.time.rollout + proposal.step.time.sync for proposal in proposals)
    limit = _ABOUT_AS_FAST * (proposals[0].step.time.total - common) + common
    close = [p for p in proposals if p.step.time.total <= limit and p.changed_rows == proposals[0].changed_rows]
    roomy = [proposal for proposal in close if proposal.layout.fullest.peak <= _ROOMY * usable]
    return roomy[0] if roomy else min(close, key=lambda proposal: proposal.layout.fullest.peak)


def _sizes(arch: ModelArchitecture, cluster: Cluster, longest: int) -> Iterator[dict[str, Any]]:
    """Sizes that multiply to the GPUs, as keys of `parallel`; TP stays within a node. longest: tokens of a row."""
    for tp in _divisors(math.gcd(cluster.gpus, cluster.gpus_per_node)):
        for cp in _divisors(cluster.gpus // tp):
            if cp > max(1, longest // _FEWEST_TOKENS):
                continue
            for pp in _divisors(cluster.gpus // (tp * cp)):
                if pp > arch.num_layers:
                    continue
                experts = math.gcd(cluster.gpus // pp, arch.moe.num_experts) if arch.moe else 1
                for ep in _divisors(experts):
                    yield {
                        "tensor_model_parallel_size": tp,
                        "context_parallel_size": cp,
                        "pipeline_model_parallel_size": pp,
                        "expert_model_parallel_size": ep,
                    }


def _cuts(arch: ModelArchitecture, sizes: dict[str, Any], most_chunks: int) -> Iterator[dict[str, Any]]:
    """Chunks of a stage, and layers of each: the same for all where that comes out even, and by what they cost."""
    pp = sizes["pipeline_model_parallel_size"]
    whole = {
        "virtual_pipeline_model_parallel_size": None,
        "pipeline_layout": None,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
    }
    yield whole
    if pp == 1:
        return
    for chunks in (None, *range(2, min(most_chunks, arch.num_layers // pp) + 1)):
        even = {**whole, "virtual_pipeline_model_parallel_size": chunks}
        by_cost = {**even, "pipeline_layout": "auto"}
        if chunks is not None:
            yield even
        if arch.num_layers % (pp * (chunks or 1)) == 0:  # else it is cut by cost anyway
            yield by_cost


class _Attempt:
    """A configuration that is tried under layouts; what does not depend on them is looked at once."""

    def __init__(self, config: Config, arch: ModelArchitecture, cluster: Cluster) -> None:
        self._config, self._arch, self._cluster = config, arch, cluster
        self._plans: dict[tuple, Plan] = {}

    def lay_out(self, sizes: dict[str, Any], cut: dict[str, Any], *, recompute: bool) -> Layout:
        """Raises UserError where a rule forbids it."""
        # Without other ranks both keys do nothing, and stay as they are.
        splits_sequences = sizes["tensor_model_parallel_size"] > 1 or self._config.parallel.sequence_parallel
        parallel = self._config.parallel.model_copy(update={**sizes, **cut, "sequence_parallel": splits_sequences})
        # With whole layers one at a time; without, the parts that the configuration names, if it does.
        own = self._config.model.recompute if isinstance(self._config.model.recompute, list) else False
        whole = {"recompute": True, "recompute_method": None, "recompute_num_layers": None}
        model = self._config.model.model_copy(update=whole if recompute else {**whole, "recompute": own})
        config = self._config.model_copy(update={"parallel": parallel, "model": model})
        data_parallel_size = check_layout(config, self._arch, self._cluster.gpus)
        copies = data_parallel_size * parallel.context_parallel_size
        is_sharded = copies > 1 or config.optimizer.use_distributed_optimizer
        optimizer = config.optimizer.model_copy(update={"use_distributed_optimizer": is_sharded})
        config = with_fitting_batches(config.model_copy(update={"optimizer": optimizer}), data_parallel_size)
        plan, gpu_bytes = self._plan(config, data_parallel_size), self._cluster.gpu.memory
        memories = rank_memories(config, self._arch, plan, layers="transformer_engine", gpu_bytes=gpu_bytes)
        return Layout(config, plan, memories)

    def _plan(self, config: Config, data_parallel_size: int) -> Plan:
        train, parallel = config.train, config.parallel
        interleaved = parallel.virtual_pipeline_model_parallel_size is not None
        stages = parallel.pipeline_model_parallel_size if interleaved else 1
        sharded = config.optimizer.use_distributed_optimizer
        key = (data_parallel_size, train.global_batch_size, train.micro_batch_size, stages, sharded)
        if key not in self._plans:
            self._plans[key] = make_plan(config, self._arch, self._cluster.gpus)
        return self._plans[key]


def with_fitting_batches(config: Config, data_parallel_size: int) -> Config:
    """Micro-batches that come out even: of fewer rows where that changes no number, else more rows in a step.

    The least number of rows that is no smaller than configured, in the largest micro-batches. Under a budget of tokens
    any number of rows comes out.
    """
    train, num_generations = config.train, config.rollout.num_generations
    if train.global_batch_size is None or not counts_rows(config):
        return config
    is_free = SEMANTICS[config.chord.semantics].micro_batches is None
    is_free &= config.chord.chord_sft_per_device_train_batch_size is None
    choices = []
    for size in _divisors(train.micro_batch_size) if is_free else [train.micro_batch_size]:
        share = math.lcm(num_generations, size * data_parallel_size)
        choices.append((-(-train.global_batch_size // share) * share, -size))
    rows, size = min(choices)
    if (rows, -size) == (train.global_batch_size, train.micro_batch_size):
        return config
    changed = train.model_copy(update={"global_batch_size": rows, "micro_batch_size": -size})
    return config.model_copy(update={"train": changed})


def changes(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) of what differs."""
    old, new = before.model_dump(), after.model_dump()
    return {
        f"{group}.{key}": (value, new[group][key])
        for group, values in old.items()
        for key, value in values.items()
        if new[group][key] != value
    }


def _propose(
    layout: Layout, before: Config, arch: ModelArchitecture, cluster: Cluster, assumptions: Assumptions
) -> Proposal:
    step = estimate_step(layout.config, arch, layout.plan, cluster, assumptions)
    return Proposal(layout, step, layout.config.train.global_batch_size != before.train.global_batch_size)


def _check_sampler(config: Config, arch: ModelArchitecture, cluster: Cluster) -> None:
    """That a colocated vLLM's share holds its weights, whatever the trainer's layout."""
    rollout = config.rollout
    if rollout.vllm_mode != "colocate":
        return
    needed = export_bytes(config, arch) / rollout.vllm_tensor_parallel_size
    share = rollout.vllm_gpu_memory_utilization * cluster.gpu.memory
    if needed >= share:
        raise UserError(
            f"a colocated vLLM needs {needed / 1e9:.1f} GB of each GPU for its weights, but rollout."
            f"vllm_gpu_memory_utilization={rollout.vllm_gpu_memory_utilization} leaves it {share / 1e9:.1f} GB; raise "
            f"it, or rollout.vllm_tensor_parallel_size={rollout.vllm_tensor_parallel_size}"
        )


def _why_none(too_large: list[Layout], refused: Counter[str], cluster: Cluster, usable: int) -> str:
    """One sentence."""
    if not too_large:
        return refused.most_common(1)[0][0]
    smallest = too_large[0]
    name, size = max(smallest.fullest.parts_at_peak().items(), key=lambda part: part[1])
    return (
        f"none of {len(too_large)} layouts fits {cluster.gpus} x {cluster.gpu.name}: the smallest, {smallest.name}, "
        f"needs {smallest.fullest.peak / 1e9:.1f} GB of {usable / 1e9:.1f} GB, most of it for {name} "
        f"({size / 1e9:.1f} GB); {_remedy(name)}"
    )


def _remedy(part: str) -> str:
    return {
        "activations": "lower data.max_prompt_length, rollout.max_completion_length or chord.chord_sft_max_length, "
        "which bound the rows, or take more GPUs",
        "KV cache": "lower rollout.max_batch_size, or take more GPUs",
        "generation": "lower rollout.max_batch_size, or take more GPUs",
        "vLLM": "lower rollout.vllm_gpu_memory_utilization, or set rollout.sleep_level, offload_optimizer or "
        "offload_model",
    }.get(part, "take more GPUs, or larger ones")


@cache
def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
