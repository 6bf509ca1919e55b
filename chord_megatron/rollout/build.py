"""The rollout engine that a configuration names."""

from __future__ import annotations

from pathlib import Path

import torch

from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import ParallelGroups
from chord_megatron.config import Config
from chord_megatron.rollout.embedded import EmbeddedRollout
from chord_megatron.rollout.protocol import RolloutEngine
from chord_megatron.rollout.recorded_routing import RoutingForm
from chord_megatron.rollout.replay import ReplayRollout
from chord_megatron.rollout.servers.pool import ServerPool
from chord_megatron.rollout.servers.rollout import ServerRollout
from chord_megatron.rollout.servers.transfer import BroadcastTransfer, FileTransfer, WeightTransfer
from chord_megatron.rollout.updates.agreement import identity, read_token
from chord_megatron.system.work import Work
from chord_megatron.weights.architecture import ModelArchitecture


def build_rollout(
    config: Config, engine: MegatronEngine, groups: ParallelGroups, work: Work | None = None
) -> RolloutEngine:
    """Raises UserError where the engine is not installed or cannot be reached. A collective call of all ranks.

    work: where the engine tells how far it is.
    """
    rollout = config.rollout
    match rollout.engine, rollout.vllm_mode:
        case "megatron", _:
            return build_embedded(config, engine, groups, work)
        case "replay", _:
            assert rollout.replay_from is not None
            form = _routing_form(config, engine.arch)
            return ReplayRollout(Path(rollout.replay_from), vocab_size=engine.arch.vocab_size, routing=form)
        case "vllm", "colocate":
            return _build_colocate(config, engine)
        case "vllm", "server":
            return _build_servers(config, groups, work or Work())
    raise AssertionError(f"rollout.engine={rollout.engine} with vllm_mode={rollout.vllm_mode} has no builder")


def build_embedded(
    config: Config, engine: MegatronEngine, groups: ParallelGroups, work: Work | None = None
) -> EmbeddedRollout:
    """The engine that samples with the training weights."""
    return EmbeddedRollout(
        engine,
        groups.dp_cp_group,
        groups.device,
        seed=config.train.seed,
        max_batch_size=config.rollout.max_batch_size,
        routing=_routing_form(config, engine.arch),
        work=work,
    )


def _routing_form(config: Config, arch: ModelArchitecture) -> RoutingForm | None:
    """None where nobody asks which experts a sampler used."""
    if arch.moe is None or config.rollout.router_replay != "sampler":
        return None
    return RoutingForm(len(arch.moe_layers), arch.moe.experts_per_token, arch.moe.num_experts)


def _build_colocate(config: Config, engine: MegatronEngine) -> RolloutEngine:
    from chord_megatron.rollout.vllm_colocate import VllmColocateRollout

    rollout = config.rollout
    # vLLM starts only where its share of the GPU is free.
    with engine.offloaded(optimizer=rollout.offload_optimizer, model=rollout.offload_model):
        return VllmColocateRollout(
            Path(config.model.path),
            engine.arch,
            device=engine.groups.device,
            dtype=config.model.dtype,
            seed=config.train.seed,
            tensor_parallel_size=rollout.vllm_tensor_parallel_size,
            max_model_len=config.data.max_prompt_length + rollout.max_completion_length,
            max_num_seqs=rollout.max_batch_size,
            gpu_memory_utilization=rollout.vllm_gpu_memory_utilization,
            enforce_eager=rollout.vllm_enforce_eager,
            sleep_level=rollout.sleep_level,
        )


def _build_servers(config: Config, groups: ParallelGroups, work: Work) -> ServerRollout:
    rollout = config.rollout
    pool = None
    if groups.rank == 0:
        pool = ServerPool(
            rollout.vllm_servers or [],
            read_token(),
            identity(Path(config.model.path), config.model.dtype),
            timeout=rollout.vllm_server_timeout,
            max_in_flight=rollout.max_batch_size,
            work=work,
        )
    return ServerRollout(pool, _build_transfer(config, groups.device), groups.device, seed=config.train.seed)


def _build_transfer(config: Config, device: torch.device) -> WeightTransfer:
    rollout, bucket_bytes = config.rollout, config.model.export_bucket_megabytes * 10**6
    if rollout.weight_transfer == "files":
        return FileTransfer(Path(rollout.weight_transfer_dir), bucket_bytes=bucket_bytes)
    return BroadcastTransfer(
        rollout.weight_transfer_address, device=device, bucket_bytes=bucket_bytes, timeout=rollout.vllm_server_timeout
    )
