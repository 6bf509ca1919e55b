"""Hugging Face weights into this rank's model chunks, and back out as full tensors, bucket by bucket."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from chord_megatron.backend.groups import ParallelGroups
from chord_megatron.backend.model import CausalLM, unwrap
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.mapping import find_mapping, mapped_parameters, padded_vocab_size
from chord_megatron.weights.safetensors_io import SafetensorsReader, check_complete
from chord_megatron.weights.shards import export_parameter, import_parameter

_EXPERT = re.compile(r"(?<=mlp\.experts\.local_experts\.)\d+|(?<=mlp\.experts\.linear_fc[12]\.weight)\d+$")


def named_weights(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """(Megatron name with global layer and expert numbers, tensor) of this rank's chunks.

    The tensors are the parameters and the routers' expert biases, which are buffers.
    """
    for chunk in chunks:
        model = unwrap(chunk)
        layers = get_transformer_layer_offset(model.config, model.vp_stage)
        experts = _first_expert(model)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if isinstance(tensor, torch.nn.Parameter) or name.endswith("router.expert_bias"):
                yield _with_global_numbers(name, layers, experts), tensor


@torch.no_grad()
def load_hf_weights(
    chunks: list[torch.nn.Module], model_dir: Path, arch: ModelArchitecture, groups: ParallelGroups
) -> None:
    """Fill every parameter of this rank from `model_dir`, reading only the slices it needs.

    Raises UserError where a tensor is missing, unexpected or of the wrong shape.
    """
    with SafetensorsReader(model_dir) as reader:
        check_complete(reader, arch)
        for name, parameter in named_weights(chunks):
            # Experts are whole (groups.py).
            tp_rank, tp_size = (0, 1) if _EXPERT.search(name) else (groups.tp_rank, groups.tp_size)
            shard = import_parameter(
                name,
                arch,
                reader.get_slice,
                tp_rank=tp_rank,
                tp_size=tp_size,
                padded_vocab_size=padded_vocab_size(arch.vocab_size, groups.tp_size),
            )
            parameter.copy_(shard)


@dataclass(frozen=True)
class _Shard:
    """One rank's part of a parameter: what the other ranks must know to receive it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stage: int  # pipeline rank that has it
    ep_rank: int | None  # expert-parallel rank that has it; None: all

    @property
    def owner(self) -> tuple:
        """What shards that are gathered together have in common."""
        return self.stage, self.ep_rank, self.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@torch.no_grad()
def export_hf_weights(
    chunks: list[torch.nn.Module],
    arch: ModelArchitecture,
    groups: ParallelGroups,
    bucket_bytes: int,
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, full tensor) of the whole model on every rank, in the order of the family's table.

    Parameters are gathered together, `bucket_bytes` of full tensors at a time (one larger than that by itself):
    that and a copy of the parameter at hand are the memory it takes. A collective over the TP, PP and EP groups:
    every rank must exhaust the iterator.
    """
    mine = {find_mapping(name, arch).local_name: tensor for name, tensor in named_weights(chunks)}
    buckets = _fill_buckets(_locate(mine, arch, groups), groups, bucket_bytes)
    # One buffer for all: new memory is several times slower than memory in use, where the system has to clear it.
    size = max(sum(_full_bytes(shard, groups) for shard in bucket) for bucket in buckets)
    buffer = torch.empty(size if _is_distributed(groups) else 0, dtype=torch.uint8, device=groups.device)
    for bucket in buckets:
        for shard, tensors in zip(bucket, _gather(bucket, mine, groups, buffer), strict=True):
            yield from export_parameter(shard.name, arch, tensors)


def _locate(mine: dict[str, Tensor], arch: ModelArchitecture, groups: ParallelGroups) -> list[_Shard]:
    """The shard of every exported parameter of the model, in the order of the table; the same on every rank.

    A stage describes its own shards; those of other expert-parallel ranks look like them.
    """
    stages: list[dict[str, tuple]] = [{}] * groups.pp_size
    dist.all_gather_object(
        stages,
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in mine.items()},
        group=groups.pp_group,
    )
    owner = {name: (stage, *description) for stage, names in enumerate(stages) for name, description in names.items()}
    experts_per_rank = arch.moe.num_experts // groups.ep_size if arch.moe else 1
    shards = []
    for parameter in mapped_parameters(arch):
        ep_rank, twin = None, parameter
        if parameter.expert is not None:
            ep_rank, index = divmod(parameter.expert, experts_per_rank)
            twin = parameter._replace(expert=groups.ep_rank * experts_per_rank + index)
        if not parameter.mapping.is_copy:
            stage, dtype, shape = owner[twin.local_name]
            shards.append(_Shard(parameter.local_name, dtype, shape, stage, ep_rank))
    return shards


def _fill_buckets(shards: list[_Shard], groups: ParallelGroups, bucket_bytes: int) -> list[list[_Shard]]:
    """Runs of shards with one owner and dtype, up to `bucket_bytes` over all ranks each."""
    buckets: list[list[_Shard]] = [[]]
    size = 0
    for shard in shards:
        full = _full_bytes(shard, groups)
        if buckets[-1] and (size + full > bucket_bytes or shard.owner != buckets[-1][0].owner):
            buckets.append([])
            size = 0
        buckets[-1].append(shard)
        size += full
    return buckets


def _full_bytes(shard: _Shard, groups: ParallelGroups) -> int:
    """What the tensor-parallel ranks' shards take together; experts are whole (groups.py)."""
    return shard.numel * shard.dtype.itemsize * (groups.tp_size if shard.ep_rank is None else 1)


def _is_distributed(groups: ParallelGroups) -> bool:
    return max(groups.tp_size, groups.pp_size, groups.ep_size) > 1


def _gather(
    bucket: list[_Shard], mine: dict[str, Tensor], groups: ParallelGroups, buffer: Tensor
) -> list[list[Tensor]]:
    """Of each shard in the bucket all tensor-parallel ranks' tensors, in rank order, as views of `buffer`."""
    if not _is_distributed(groups):
        return [[mine[shard.name].detach()] for shard in bucket]
    stage, ep_rank, dtype = bucket[0].owner
    is_expert = ep_rank is not None
    tp_rank, tp_size = (0, 1) if is_expert else (groups.tp_rank, groups.tp_size)
    sizes = [shard.numel for shard in bucket]
    everyone = buffer[: sum(sizes) * tp_size * dtype.itemsize].view(dtype).view(tp_size, -1)
    flat = everyone[tp_rank]
    if stage == groups.pp_rank and ep_rank in (None, groups.ep_rank):
        torch.cat([mine[shard.name].detach().flatten() for shard in bucket], out=flat)
    if groups.pp_size > 1 and ep_rank in (None, groups.ep_rank):
        dist.broadcast(flat, dist.get_global_rank(groups.pp_group, stage), group=groups.pp_group)
    if groups.ep_size > 1 and is_expert:
        dist.broadcast(flat, dist.get_global_rank(groups.ep_group, ep_rank), group=groups.ep_group)
    if tp_size > 1:
        dist.all_gather_into_tensor(everyone.view(-1), flat, group=groups.tp_group)
    columns = everyone.split(sizes, dim=1)
    return [[row.view(shard.shape) for row in column] for shard, column in zip(bucket, columns, strict=True)]


def _first_expert(model: CausalLM) -> int:
    """Global number of this rank's first expert."""
    config = model.config
    if config.num_moe_experts is None:
        return 0
    return config.num_moe_experts // config.expert_model_parallel_size * model.pg_collection.ep.rank()


def _with_global_numbers(name: str, layers: int, experts: int) -> str:
    name = re.sub(r"(?<=^decoder\.layers\.)\d+", lambda match: str(int(match[0]) + layers), name)
    return _EXPERT.sub(lambda match: str(int(match[0]) + experts), name)
