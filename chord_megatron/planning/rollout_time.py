"""How long drawing completions takes, and bringing the sampler's weights up to date."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chord_megatron.config import Config
from chord_megatron.planning.decoding_memory import cached_numbers
from chord_megatron.planning.flops import active_share, head_flops, token_flops
from chord_megatron.planning.gpus import Assumptions, Cluster
from chord_megatron.planning.memory import export_bytes, model_state, parameters_by_place
from chord_megatron.planning.plan import Plan
from chord_megatron.planning.traffic import Links
from chord_megatron.planning.workload import Workload
from chord_megatron.weights.architecture import ModelArchitecture

_MEMORY_FOLDERS = ("/dev/shm", "/run/shm")


@dataclass(frozen=True)
class _Samplers:
    """Copies of the model that draw completions side by side."""

    tp: int  # GPUs of a copy that work on a token at the same time
    expert_shards: int  # GPUs that share the experts
    expert_copies: int  # copies whose tokens meet the same experts
    rows: float  # completions of each copy
    prompts: float  # that each copy reads
    is_continuous: bool  # takes a new row when one ends, else when all that it decodes have
    has_graphs: bool


def rollout_seconds(
    config: Config, arch: ModelArchitecture, plan: Plan, cluster: Cluster, assumptions: Assumptions, load: Workload
) -> float:
    """Of one optimizer step's completions, whose generation batch several steps may share. Recordings cost nothing."""
    rollout = config.rollout
    if not load.completions or rollout.engine == "replay":
        return 0.0
    samplers = _samplers(config, arch, plan, cluster, load)
    prefill = samplers.prompts * load.prompt_tokens * token_flops(arch, load.prompt_tokens)
    prefill /= samplers.tp * cluster.gpu.bf16_tflops * 1e12 * assumptions.mfu
    at_once = min(samplers.rows, rollout.max_batch_size)
    tokens = samplers.rows * load.completion_tokens
    steps = rollout.max_completion_length * samplers.rows / at_once
    if samplers.is_continuous:
        steps = max(rollout.max_completion_length, tokens / at_once)
    token = _decode_seconds(arch, cluster, assumptions, samplers, _Decoding(tokens / steps, load, config.model.dtype))
    return (prefill + steps * token) / plan.steps_per_rollout


def _samplers(config: Config, arch: ModelArchitecture, plan: Plan, cluster: Cluster, load: Workload) -> _Samplers:
    parallel, rollout = config.parallel, config.rollout
    rows = load.completions * config.grpo.steps_per_generation
    if rollout.engine == "megatron":
        tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
        rows_of_copy = rows / plan.data_parallel_size
        return _Samplers(tp, ep, max(1, ep // tp), rows_of_copy, rows_of_copy, is_continuous=False, has_graphs=False)
    tp, copies = server_gpus(config, arch, cluster), len(rollout.vllm_servers or ())
    if rollout.vllm_mode == "colocate":
        tp, copies = rollout.vllm_tensor_parallel_size, plan.world_size // rollout.vllm_tensor_parallel_size
    rows_of_copy = rows / copies
    prompts = rows_of_copy / rollout.num_generations  # vLLM caches prefixes: a group's prompt is read once
    return _Samplers(tp, tp, 1, rows_of_copy, prompts, is_continuous=True, has_graphs=not rollout.vllm_enforce_eager)


def server_gpus(config: Config, arch: ModelArchitecture, cluster: Cluster) -> int:
    """What a vLLM server is taken to have: a node of them, doubled until the weights take half of their memory."""
    gpus = cluster.gpus_per_node
    while export_bytes(config, arch) > gpus * cluster.gpu.memory / 2:
        gpus *= 2
    return gpus


@dataclass(frozen=True)
class _Decoding:
    """One token of each row that is being decoded."""

    rows: float
    load: Workload
    dtype: str


def _decode_seconds(
    arch: ModelArchitecture, cluster: Cluster, assumptions: Assumptions, samplers: _Samplers, decoding: _Decoding
) -> float:
    """Weights and KV cache are read once, layer after layer: how many stages hold the layers does not matter.

    Of the experts those are read that one of the tokens is routed to.
    """
    gpu, tp, rows, load = cluster.gpu, samplers.tp, decoding.rows, decoding.load
    places = parameters_by_place(arch, 1)
    dense = sum(held.dense for place, held in places.items() if place != "embedding")
    expert = sum(held.expert for held in places.values()) / samplers.expert_shards
    expert *= 1 - (1 - active_share(arch)) ** (rows * samplers.expert_copies)
    length = load.prompt_tokens + load.completion_tokens / 2
    cache = rows * length * arch.num_layers * cached_numbers(arch) / tp
    read = getattr(torch, decoding.dtype).itemsize * (dense / tp + expert + cache)
    computed = rows * (token_flops(arch, length) + head_flops(arch)) / (tp * gpu.bf16_tflops * 1e12 * assumptions.mfu)
    launched = arch.num_layers * (assumptions.graphed_layer if samplers.has_graphs else assumptions.decoded_layer)
    is_near = cluster.within_node(stride=1, size=samplers.expert_shards)
    latency = assumptions.nvlink_latency if is_near else assumptions.network_latency
    exchanges = 2 * arch.num_layers * ((tp > 1) * assumptions.nvlink_latency + (samplers.expert_copies > 1) * latency)
    return max(read / (gpu.hbm_gb_per_s * 1e9 * assumptions.memory_share), computed, launched) + exchanges


def sync_seconds(config: Config, arch: ModelArchitecture, links: Links) -> float:
    """The whole model to vLLM after each update; the embedded engine has it."""
    rollout, parallel = config.rollout, config.parallel
    if rollout.engine != "vllm":
        return 0.0
    nbytes, assumed, gpu = export_bytes(config, arch), links.assumptions, links.cluster.gpu
    is_split = max(parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size) > 1
    within_node = links.cluster.is_one_node or not is_split
    gather = links.message("", "", nbytes, 1, within_node=within_node).seconds
    if rollout.vllm_mode == "colocate":
        return gather
    rate = gpu.network_gb_per_s * assumed.link_share
    if rollout.weight_transfer == "files" and not rollout.weight_transfer_dir.startswith(_MEMORY_FOLDERS):
        rate = assumed.disk_gb_per_s
    return gather + nbytes / (1e9 * rate)


def offload_seconds(config: Config, arch: ModelArchitecture, plan: Plan, assumptions: Assumptions) -> float:
    """State to the host and back around a colocated sampler, and the reference's weights to the device and back."""
    state, rollout = model_state(config, arch, plan), config.rollout
    moved = 2 * (state.weights * rollout.offload_model + state.optimizer * rollout.offload_optimizer)
    # The reference comes in place of the weights, which go to the host and come back (_swap_reference).
    moved += 4 * state.reference // config.grpo.num_iterations
    return moved / (1e9 * assumptions.host_gb_per_s)
