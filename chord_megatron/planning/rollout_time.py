"""How long drawing completions takes, and bringing the sampler's weights up to date."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    stages: int  # which work on a share of the rows each, at the same time
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
    prefill /= samplers.tp * samplers.stages * cluster.gpu.bf16_tflops * 1e12 * assumptions.mfu
    at_once = min(samplers.rows, rollout.max_batch_size)
    tokens = samplers.rows * load.completion_tokens
    steps = rollout.max_completion_length * samplers.rows / at_once
    if samplers.is_continuous:
        steps = max(rollout.max_completion_length, tokens / at_once)
    token = _decode_seconds(arch, cluster, assumptions, samplers, _Decoding(tokens / steps, load, config.model.dtype))
    return (prefill + steps * token) / plan.steps_per_rollout


def _samplers(config: Config, arch: ModelArchitecture, plan: Plan, cluster: Cluster, load: Workload) -> _Samplers:
    """A group's prompt is read once: prompts are cached by vLLM, and shared by the embedded engine's rows."""
    parallel, rollout = config.parallel, config.rollout
    if rollout.engine == "megatron":
        tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
        copies, stages = plan.data_parallel_size * parallel.context_parallel_size, parallel.pipeline_model_parallel_size
        placed = _Samplers(tp, stages, ep, max(1, ep // tp), 0, 0, is_continuous=False, has_graphs=False)
    else:
        tp, copies = server_gpus(config, arch, cluster), len(rollout.vllm_servers or ())
        if rollout.vllm_mode == "colocate":
            tp, copies = rollout.vllm_tensor_parallel_size, plan.world_size // rollout.vllm_tensor_parallel_size
        placed = _Samplers(tp, 1, tp, 1, 0, 0, is_continuous=True, has_graphs=not rollout.vllm_enforce_eager)
    rows = load.completions * config.grpo.steps_per_generation / copies
    return replace(placed, rows=rows, prompts=rows / rollout.num_generations)


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
    """Every rank reads its weights once for each cohort of rows, of which there are as many as stages.

    So a pipeline's stages read the weights together as often as one stage would all of them; the KV cache of a row, and
    the computing, they share. Of the experts those are read that one of the tokens is routed to.
    """
    gpu, tp, stages = cluster.gpu, samplers.tp, samplers.stages
    rows, load = decoding.rows, decoding.load
    places = parameters_by_place(arch, 1)
    dense = sum(held.dense for place, held in places.items() if place != "embedding")
    expert = sum(held.expert for held in places.values()) / samplers.expert_shards
    expert *= 1 - (1 - active_share(arch)) ** (rows / stages * samplers.expert_copies)
    length = load.prompt_tokens + load.completion_tokens / 2
    cache = rows * length * arch.num_layers * cached_numbers(arch) / (tp * stages)
    read = getattr(torch, decoding.dtype).itemsize * (dense / tp + expert + cache)
    flops = rows * (token_flops(arch, length) + head_flops(arch))
    computed = flops / (tp * stages * gpu.bf16_tflops * 1e12 * assumptions.mfu)
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
