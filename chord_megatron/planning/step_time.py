"""How long an optimizer step takes by part: multiplications, bytes and messages over the rates of the GPUs.

Nothing overlaps but the gradients' sums with the backward pass of the last micro-batch, where that is on. What is
assumed of the rates: gpus.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from chord_megatron.config import Config
from chord_megatron.planning.flops import head_flops, layer_flops, token_flops
from chord_megatron.planning.gpus import Assumptions, Cluster
from chord_megatron.planning.memory import model_states, stage_parameters
from chord_megatron.planning.pipeline import stage_layers
from chord_megatron.planning.plan import Plan
from chord_megatron.planning.rollout_time import offload_seconds, rollout_seconds, sync_seconds
from chord_megatron.planning.traffic import (
    Links,
    Message,
    data_parallel_messages,
    head_messages,
    layer_messages,
    seconds_of,
    stage_messages,
)
from chord_megatron.planning.workload import Workload, workload
from chord_megatron.weights.architecture import ModelArchitecture

_FLOAT32 = 4


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by part; with max_staleness, `rollout` is what of it is not hidden."""

    rollout: float
    log_probs: float  # of the policy before the step, and of the reference, where something needs them
    compute: float  # forward and backward, on the average stage
    communication: float  # of tensor, context, expert and pipeline parallelism meanwhile
    bubble: float  # stages that wait for one another, because the pipeline fills and drains or they are not equal
    gradients: float  # their sums over data-parallel ranks, as far as the backward pass does not hide them
    optimizer: float  # Adam, and the parameters back to all ranks
    sync: float  # new weights to the sampler, and what makes room for one

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def parts(self) -> dict[str, float]:
        """By name, for tables."""
        return {name.replace("_", "-"): seconds for name, seconds in vars(self).items()}


@dataclass(frozen=True)
class StepEstimate:
    """A step's time, and what its slowest GPU sends in it."""

    time: StepTime
    messages: list[Message]
    model_flops: float  # of all GPUs: what a step needs, without recomputation


@dataclass(frozen=True)
class _StageWork:
    """Of one pipeline rank and one micro-batch, in seconds."""

    forward: float
    backward: float
    messages_forward: list[Message]
    messages_backward: list[Message]

    @property
    def communication(self) -> float:
        return seconds_of(self.messages_forward) + seconds_of(self.messages_backward)

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.communication


def estimate_step(
    config: Config, arch: ModelArchitecture, plan: Plan, cluster: Cluster, assumptions: Assumptions
) -> StepEstimate:
    """The step of a checked configuration."""
    load, links = workload(config, plan, assumptions.fill), Links(cluster, assumptions)
    parallel = config.parallel
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    micro_batches = load.micro_batches
    work = _stage_work(config, arch, plan, load, links)
    slowest = max(work, key=lambda stage: stage.total)
    compute = micro_batches * sum(stage.forward + stage.backward for stage in work) / pp
    communication = micro_batches * sum(stage.communication for stage in work) / pp
    # 1F1B, interleaved: Narayanan et al., arXiv 2104.04473, section 2.2: (p - 1) / v more micro-batches.
    schedule = (micro_batches + (pp - 1) / chunks) * slowest.total
    reduction, parameters = _data_parallel(config, arch, links, plan)
    is_overlapped = config.optimizer.overlap_grad_reduce is not False
    hidden = slowest.backward + seconds_of(slowest.messages_backward) if is_overlapped else 0.0
    log_probs = _log_prob_seconds(config, plan, load, work)
    trained = schedule + log_probs
    rollout = rollout_seconds(config, arch, plan, cluster, assumptions, load)
    time = StepTime(
        rollout=max(0.0, rollout - trained) if config.rollout.max_staleness else rollout,
        log_probs=log_probs,
        compute=compute,
        communication=communication,
        bubble=max(0.0, schedule - compute - communication),  # of one stage it is 0 to rounding
        gradients=max(0.0, seconds_of(reduction) - hidden),
        optimizer=_optimizer_seconds(config, arch, plan, links) + seconds_of(parameters),
        sync=sync_seconds(config, arch, links) + offload_seconds(config, arch, plan, assumptions),
    )
    sent = [m.times(micro_batches) for m in slowest.messages_forward + slowest.messages_backward]
    flops = 3 * (token_flops(arch, load.mean_row) * load.tokens + head_flops(arch) * load.counted_tokens)
    return StepEstimate(time, [*sent, *reduction, *parameters], flops)


def _stage_work(config: Config, arch: ModelArchitecture, plan: Plan, load: Workload, links: Links) -> list[_StageWork]:
    """Of each pipeline rank, for a micro-batch of mean size."""
    parallel = config.parallel
    slots = plan.data_parallel_size * load.micro_batches
    tokens, counted = load.tokens / slots, load.counted_tokens / slots
    shares = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    rate = links.cluster.gpu.bf16_tflops * 1e12 * links.assumptions.mfu * shares
    backward_passes = 3 if config.model.recomputes_layers else 2
    # Layers of one kind are alike: their operations, as if at the rate of those without experts, and their messages.
    kinds = {arch.is_moe_layer(layer): layer for layer in range(arch.num_layers)}
    slowness = {False: 1.0, True: 1 / links.assumptions.experts_share}
    flops = {is_moe: slowness[is_moe] * layer_flops(arch, layer, load.mean_row) for is_moe, layer in kinds.items()}
    sent, sent_back = (
        {
            is_moe: layer_messages(config, arch, links, tokens=tokens, is_moe=is_moe, backward=backward)
            for is_moe in kinds
        }
        for backward in (False, True)
    )
    between = stage_messages(config, arch, links, tokens=tokens)
    work = []
    for counts in _kinds_of_stages(config, arch):
        forward = sum(flops[is_moe] * count for is_moe, count in counts.items()) * tokens
        messages, messages_back = (
            [m.times(count) for is_moe, count in counts.items() for m in of_kind[is_moe]]
            for of_kind in (sent, sent_back)
        )
        work.append(_StageWork(forward / rate, backward_passes * forward / rate, messages + between, messages_back))
    # The head's backward pass computes the logits again, and two gradients (ops/linear_log_probs.py).
    head, last = head_flops(arch) * counted / rate, work[-1]
    work[-1] = replace(
        last,
        forward=last.forward + head,
        backward=last.backward + 3 * head,
        messages_backward=last.messages_backward + head_messages(config, arch, links, tokens=counted),
    )
    return work


def _kinds_of_stages(config: Config, arch: ModelArchitecture) -> list[Counter[bool]]:
    """How many layers with experts (True) and without each pipeline rank has."""
    pp, first = config.parallel.pipeline_model_parallel_size, 0
    counts = [Counter[bool]() for _ in range(pp)]
    for stage, count in enumerate(stage_layers(config.parallel, arch)):
        counts[stage % pp].update(arch.is_moe_layer(layer) for layer in range(first, first + count))
        first += count
    return counts


def _log_prob_seconds(config: Config, plan: Plan, load: Workload, work: list[_StageWork]) -> float:
    """Forward passes over the completions of a generation batch, shared by the steps that use it.

    As training/rollout_stream.py decides: of the old policy over those that the first step leaves, as that one finds
    its own; over all of them, and of the reference, where rewards or penalties need them.
    """
    grpo, parallel = config.grpo, config.parallel
    needs_all = grpo.top_entropy_quantile < 1 or (grpo.kl_in_reward and grpo.old_log_probs == "trainer")
    needs_old = plan.steps_per_rollout > 1 and grpo.old_log_probs == "trainer"
    batches = grpo.steps_per_generation
    old = batches if needs_all else (batches - 1) * needs_old
    passes = (old + batches * (grpo.beta > 0)) / plan.steps_per_rollout
    if not passes or not load.tokens:
        return 0.0
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    slowest = max(stage.forward + seconds_of(stage.messages_forward) for stage in work)
    micro_batches = load.micro_batches * load.rollout_tokens / load.tokens
    return passes * (micro_batches + (pp - 1) / chunks) * slowest


def _data_parallel(
    config: Config, arch: ModelArchitecture, links: Links, plan: Plan
) -> tuple[list[Message], list[Message]]:
    """Messages of the gradients, and of the parameters."""
    messages = data_parallel_messages(config, arch, links, plan)
    return (
        [message for message in messages if "gradients" in message.what],
        [message for message in messages if "gradients" not in message.what],
    )


def _optimizer_seconds(config: Config, arch: ModelArchitecture, plan: Plan, links: Links) -> float:
    """Adam reads and writes its state, reads its gradients and writes its weights; of states on the host there.

    All sums of gradients are read once for their norm and set to zero once. Gradients of parameters whose states are on
    the host go there, and the weights come back.
    """
    parallel, assumed = config.parallel, links.assumptions
    held = max(stage_parameters(arch, parallel), key=sum)
    state = max(model_states(config, arch, plan), key=lambda rank: rank.optimizer + rank.offloaded)
    ranks_of_stage = plan.world_size // parallel.pipeline_model_parallel_size
    is_sharded = config.optimizer.use_distributed_optimizer
    updated = held.dense / (plan.data_parallel_size * parallel.context_parallel_size if is_sharded else 1)
    updated += held.expert / (ranks_of_stage // parallel.expert_model_parallel_size if is_sharded else 1)
    on_host = config.optimizer.optimizer_offload_fraction * config.optimizer.optimizer_cpu_offload
    passing = (_FLOAT32 + getattr(torch, config.model.dtype).itemsize) * updated  # a gradient and a weight each
    nbytes = 2 * state.optimizer + (1 - on_host) * passing + 2 * _FLOAT32 * sum(held)
    seconds = nbytes / (links.cluster.gpu.hbm_gb_per_s * 1e9 * assumed.memory_share)
    seconds += (2 * state.offloaded + on_host * passing) / (assumed.host_memory_gb_per_s * 1e9)
    return seconds + on_host * passing / (assumed.host_gb_per_s * 1e9)
