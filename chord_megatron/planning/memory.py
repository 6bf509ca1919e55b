"""What a model takes in memory and on disk, in bytes, from its architecture and layout alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from chord_megatron.config import Config, ParallelConfig, RolloutConfig
from chord_megatron.planning.optimizer import BYTES
from chord_megatron.planning.pipeline import stage_layers
from chord_megatron.planning.plan import Plan
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.families.common import EMBEDDING
from chord_megatron.weights.mapping import MappedParameter, hf_shapes, hf_tensors, mapped_parameters, padded_vocab_size
from chord_megatron.weights.schema import TensorLayout

_FLOAT32 = 4
_ONE_RANK_A_STAGE = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 1}


class Parameters(NamedTuple):
    """How many parameters one rank holds."""

    dense: int
    expert: int  # of routed experts, whose optimizer state is sharded over other ranks


@dataclass(frozen=True)
class ModelState:
    """Bytes of one rank between two steps; what a step adds is in rank_memory.py."""

    weights: int
    gradients: int
    optimizer: int
    reference: int  # on the host, whatever the device
    aside: int = 0  # on the host, while trainer and colocated sampler make room for one another
    offloaded: int = 0  # on the host, all the time: optimizer.optimizer_cpu_offload
    saving: int = 0  # on the host, of all ranks of the stage together: train.async_save

    @property
    def on_device(self) -> int:
        return self.weights + self.gradients + self.optimizer


def model_state(config: Config, arch: ModelArchitecture, plan: Plan) -> ModelState:
    """What weights, gradients and optimizer take on the fullest rank."""
    return max(model_states(config, arch, plan), key=lambda state: state.on_device)


def model_states(config: Config, arch: ModelArchitecture, plan: Plan) -> list[ModelState]:
    """What weights, gradients and optimizer take on a rank of each pipeline stage.

    Bytes per parameter: weights 2 (float32: 4), gradient sums 4, Adam's two moments 8 and, unless the weights are
    float32, their float32 copy 4; fewer where the optimizer's *_dtype say so. The distributed optimizer divides these
    12 (8) by the ranks that hold the same parameters: the data-parallel and context-parallel ones, or for experts all
    ranks of a pipeline stage / EP.
    """
    parallel, rollout = config.parallel, config.rollout
    weight, gradient = getattr(torch, config.model.dtype).itemsize, BYTES[config.optimizer.main_grads_dtype]
    dense_shards, expert_shards = 1, 1
    if config.optimizer.use_distributed_optimizer:
        dense_shards = plan.data_parallel_size * parallel.context_parallel_size
        ranks_of_stage = plan.world_size // parallel.pipeline_model_parallel_size
        expert_shards = ranks_of_stage // parallel.expert_model_parallel_size
    # Of a sampler asleep at level 1 the weights are on the host.
    asleep = export_bytes(config, arch) // rollout.vllm_tensor_parallel_size if rollout.sleep_level == 1 else 0
    states = []
    saved = _saved_bytes(config) if config.train.async_save else 0
    of_stages = stage_parameters(arch, parallel.model_copy(update=_ONE_RANK_A_STAGE))
    for held, of_stage in zip(stage_parameters(arch, parallel), of_stages):
        weights = weight * (held.dense + held.expert)
        moments = optimizer_bytes(config, held, dense_shards, expert_shards)
        states.append(
            ModelState(
                weights=weights,
                gradients=gradient * (held.dense + held.expert),
                optimizer=moments.device,
                reference=weights if config.grpo.beta > 0 else 0,
                # Gradients are dropped while they are offloaded.
                aside=weights * rollout.offload_model + moments.device * rollout.offload_optimizer + asleep,
                offloaded=moments.host,
                saving=saved * (of_stage.dense + of_stage.expert),
            )
        )
    return states


class OptimizerBytes(NamedTuple):
    """Of one rank."""

    device: int
    host: int


def optimizer_bytes(config: Config, held: Parameters, dense_shards: int, expert_shards: int) -> OptimizerBytes:
    """Of parameters whose states are shared by so many ranks. On the host gradients come on top, in float32."""
    optimizer = config.optimizer
    offloaded = optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0.0
    moments = BYTES[optimizer.exp_avg_dtype] + BYTES[optimizer.exp_avg_sq_dtype]
    copy = 0 if config.model.dtype == "float32" else BYTES[optimizer.main_params_dtype]
    mine = held.dense / dense_shards + held.expert / expert_shards
    return OptimizerBytes(
        device=int((1 - offloaded) * (moments + copy) * mine), host=int(offloaded * (moments + copy + _FLOAT32) * mine)
    )


def bytes_beside_sampler(state: ModelState, rollout: RolloutConfig) -> int:
    """What of the trainer's stays on the device while a colocated sampler generates."""
    offloaded = state.weights * rollout.offload_model + (state.gradients + state.optimizer) * rollout.offload_optimizer
    return state.on_device - offloaded


def stage_parameters(arch: ModelArchitecture, parallel: ParallelConfig) -> list[Parameters]:
    """The parameters of one rank of each pipeline stage."""
    pp, ep = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    held = _held(arch, parallel.tensor_model_parallel_size, pp, tuple(stage_layers(parallel, arch)))
    return [Parameters(count.dense, count.expert // ep) for count in held]


@lru_cache(maxsize=1024)
def _held(arch: ModelArchitecture, tp: int, pp: int, layers: tuple[int, ...]) -> list[Parameters]:
    """With the experts of all expert-parallel ranks. layers: of each virtual stage."""
    counts = parameters_by_place(arch, tp)
    stage_of = [stage % pp for stage, count in enumerate(layers) for _ in range(count)]
    held = [Parameters(0, 0)] * pp
    for place, count in counts.items():
        if place == "tied output" and pp == 1:
            continue  # it is the embedding itself
        stage = stage_of[place] if isinstance(place, int) else 0 if place == "embedding" else pp - 1
        held[stage] = Parameters(held[stage].dense + count.dense, held[stage].expert + count.expert)
    return held


@lru_cache(maxsize=64)
def parameters_by_place(arch: ModelArchitecture, tp: int) -> dict[int | str, Parameters]:
    """Those that one of `tp` ranks holds of each layer (0-based), "embedding", "output" and "tied output".

    The last is a copy of the embedding, on the last of several stages. Of the experts all are counted.
    """
    counts: dict[int | str, Parameters] = {}
    for parameter in mapped_parameters(arch):
        if parameter.mapping.is_float32:
            continue  # the router's bias is a buffer
        place: int | str = "embedding" if parameter.mapping is EMBEDDING else "output"
        if parameter.layer is not None:
            place = parameter.layer
        elif parameter.mapping.is_copy:
            place = "tied output"
        dense, expert = counts.get(place, (0, 0))
        if parameter.expert is not None:
            expert += _size(parameter, arch, tp=1)
        else:
            dense += _size(parameter, arch, tp)
        counts[place] = Parameters(dense, expert)
    return counts


def checkpoint_bytes(config: Config, arch: ModelArchitecture) -> int:
    """A checkpoint of a run: weights and optimizer state, every parameter once."""
    (held,) = stage_parameters(arch, ParallelConfig())
    return (held.dense + held.expert) * _saved_bytes(config)


def export_bytes(config: Config, arch: ModelArchitecture) -> int:
    """A Hugging Face export of a run."""
    return _export_bytes(arch, config.model.dtype)


@lru_cache(maxsize=8)
def _export_bytes(arch: ModelArchitecture, dtype: str) -> int:
    return sum(spec.nbytes for spec in hf_tensors(arch, getattr(torch, dtype)).values())


def _saved_bytes(config: Config) -> int:
    """Of one parameter in a checkpoint, whose optimizer states are float32 whatever they are in training."""
    weight, moments = getattr(torch, config.model.dtype).itemsize, 2 * _FLOAT32
    # The distributed optimizer writes its float32 weights also where they are the model's
    # (DistributedOptimizer._get_main_param_and_optimizer_states).
    is_copied = config.optimizer.use_distributed_optimizer or config.model.dtype != "float32"
    return weight + moments + _FLOAT32 * is_copied


def _size(parameter: MappedParameter, arch: ModelArchitecture, tp: int) -> int:
    """Numbers of a parameter that one tensor-parallel rank holds."""
    shapes = hf_shapes(parameter, arch).values()
    layout = parameter.mapping.layout
    if layout is TensorLayout.VOCAB:
        ((rows, columns),) = shapes
        return padded_vocab_size(rows, tp) // tp * columns
    total = sum(torch.Size(shape).numel() for shape in shapes)
    return total if layout is TensorLayout.REPLICATED else total // tp
