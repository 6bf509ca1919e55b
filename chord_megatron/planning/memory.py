"""What a model takes in memory and on disk, in bytes, from its architecture and layout alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from chord_megatron.config import Config, ParallelConfig, RolloutConfig
from chord_megatron.planning.pipeline import stage_layers
from chord_megatron.planning.plan import Plan
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.families.common import EMBEDDING
from chord_megatron.weights.mapping import MappedParameter, hf_shapes, hf_tensors, mapped_parameters, padded_vocab_size
from chord_megatron.weights.schema import TensorLayout

_FLOAT32 = 4


@dataclass(frozen=True)
class Parameters:
    """How many parameters one rank holds."""

    dense: int
    expert: int  # of routed experts, whose optimizer state is sharded over other ranks


@dataclass(frozen=True)
class ModelState:
    """Bytes of the rank that holds most. Activations, the KV cache and the libraries come on top."""

    weights: int
    gradients: int
    optimizer: int
    reference: int  # on the host, whatever the device
    aside: int = 0  # on the host, while trainer and colocated sampler make room for one another

    @property
    def on_device(self) -> int:
        return self.weights + self.gradients + self.optimizer


def model_state(config: Config, arch: ModelArchitecture, plan: Plan) -> ModelState:
    """What weights, gradients and optimizer take on the fullest rank.

    Bytes per parameter: weights 2 (float32: 4), gradient sums 4, Adam's two moments 8 and, unless the weights are
    float32, their float32 copy 4. The distributed optimizer divides these 12 (8) by the ranks that hold the same
    parameters: the data-parallel and context-parallel ones, or for experts all ranks of a pipeline stage / EP.
    """
    weight = getattr(torch, config.model.dtype).itemsize
    optimizer = _optimizer_bytes(config)
    expert_copies = plan.world_size // (
        config.parallel.pipeline_model_parallel_size * config.parallel.expert_model_parallel_size
    )
    is_sharded = config.optimizer.use_distributed_optimizer
    dense_copies = plan.data_parallel_size * config.parallel.context_parallel_size
    dense_shards, expert_shards = (dense_copies, expert_copies) if is_sharded else (1, 1)
    stages = []
    for held in stage_parameters(arch, config.parallel):
        count = held.dense + held.expert
        stages.append(
            ModelState(
                weights=weight * count,
                gradients=_FLOAT32 * count,
                optimizer=optimizer * held.dense // dense_shards + optimizer * held.expert // expert_shards,
                reference=weight * count if config.grpo.beta > 0 else 0,
            )
        )
    fullest = max(stages, key=lambda state: state.on_device)
    return replace(fullest, aside=_bytes_aside(fullest, config, arch))


def bytes_beside_sampler(state: ModelState, rollout: RolloutConfig) -> int:
    """What of the trainer's stays on the device while a colocated sampler generates."""
    offloaded = state.weights * rollout.offload_model + (state.gradients + state.optimizer) * rollout.offload_optimizer
    return state.on_device - offloaded


def _bytes_aside(state: ModelState, config: Config, arch: ModelArchitecture) -> int:
    """Offloaded weights and optimizer state (gradients are dropped), and the weights of a sampler asleep at level 1."""
    rollout = config.rollout
    sampler = export_bytes(config, arch) // rollout.vllm_tensor_parallel_size if rollout.sleep_level == 1 else 0
    return state.weights * rollout.offload_model + state.optimizer * rollout.offload_optimizer + sampler


def stage_parameters(arch: ModelArchitecture, parallel: ParallelConfig) -> list[Parameters]:
    """The parameters of one rank of each pipeline stage."""
    pp = parallel.pipeline_model_parallel_size
    counts = enumerate(stage_layers(parallel, arch))
    stage_of = [stage % pp for stage, layers in counts for _ in range(layers)]
    dense, expert = [0] * pp, [0] * pp
    for parameter in mapped_parameters(arch):
        if parameter.mapping.is_float32 or (parameter.mapping.is_copy and pp == 1):
            continue  # the router's bias is a buffer; a tied output is the embedding itself
        if parameter.layer is not None:
            stage = stage_of[parameter.layer]
        else:
            stage = 0 if parameter.mapping is EMBEDDING else pp - 1
        if parameter.expert is not None:
            expert[stage] += _size(parameter, arch, tp=1)
        else:
            dense[stage] += _size(parameter, arch, parallel.tensor_model_parallel_size)
    return [Parameters(d, e // parallel.expert_model_parallel_size) for d, e in zip(dense, expert)]


def checkpoint_bytes(config: Config, arch: ModelArchitecture) -> int:
    """A checkpoint of a run: weights and optimizer state, every parameter once."""
    (held,) = stage_parameters(arch, ParallelConfig())
    weight = getattr(torch, config.model.dtype).itemsize
    # The distributed optimizer writes its float32 weights also where they are the model's
    # (DistributedOptimizer._get_main_param_and_optimizer_states).
    is_copied = config.optimizer.use_distributed_optimizer and config.model.dtype == "float32"
    return (held.dense + held.expert) * (weight + _optimizer_bytes(config) + _FLOAT32 * is_copied)


def export_bytes(config: Config, arch: ModelArchitecture) -> int:
    """A Hugging Face export of a run."""
    return sum(spec.nbytes for spec in hf_tensors(arch, getattr(torch, config.model.dtype)).values())


def _optimizer_bytes(config: Config) -> int:
    """Of one parameter."""
    moments = 2 * _FLOAT32
    return moments if config.model.dtype == "float32" else moments + _FLOAT32


def _size(parameter: MappedParameter, arch: ModelArchitecture, tp: int) -> int:
    """Numbers of a parameter that one tensor-parallel rank holds."""
    shapes = hf_shapes(parameter, arch).values()
    layout = parameter.mapping.layout
    if layout is TensorLayout.VOCAB:
        ((rows, columns),) = shapes
        return padded_vocab_size(rows, tp) // tp * columns
    total = sum(torch.Size(shape).numel() for shape in shapes)
    return total if layout is TensorLayout.REPLICATED else total // tp
