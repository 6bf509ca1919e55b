"""Hugging Face weights into this rank's model chunks, and back out as full tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from chord_megatron.backend.groups import ParallelGroups
from chord_megatron.backend.model import padded_vocab_size, unwrap
from chord_megatron.convert.architecture import ModelArchitecture
from chord_megatron.convert.safetensors_io import SafetensorsReader, check_complete
from chord_megatron.convert.shards import export_parameter, import_parameter


def named_parameters(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(Megatron name with the global layer number, parameter) of this rank's chunks."""
    for chunk in chunks:
        model = unwrap(chunk)
        offset = get_transformer_layer_offset(model.config, model.vp_stage)
        for name, parameter in model.named_parameters():
            yield _with_global_layer(name, offset), parameter


@torch.no_grad()
def load_hf_weights(
    chunks: list[torch.nn.Module], model_dir: Path, arch: ModelArchitecture, groups: ParallelGroups
) -> None:
    """Fill every parameter of this rank from `model_dir`, reading only the slices it needs.

    Raises UserError where a tensor is missing, unexpected or of the wrong shape.
    """
    with SafetensorsReader(model_dir) as reader:
        check_complete(reader, arch)
        for name, parameter in named_parameters(chunks):
            shard = import_parameter(
                name,
                arch,
                reader.get_slice,
                tp_rank=groups.tp_rank,
                tp_size=groups.tp_size,
                padded_vocab_size=padded_vocab_size(arch.vocab_size, groups.tp_size),
            )
            parameter.copy_(shard)


@torch.no_grad()
def export_hf_weights(
    chunks: list[torch.nn.Module], arch: ModelArchitecture, groups: ParallelGroups
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, full tensor) of the whole model on every rank, one parameter in memory at a time.

    A collective over the TP and PP groups: every rank must exhaust the iterator.
    """
    mine = dict(named_parameters(chunks))
    owned: list[list[tuple[str, torch.dtype, tuple[int, ...]]] | None] = [None] * groups.pp_size
    description = [(name, p.dtype, tuple(p.shape)) for name, p in mine.items()]
    dist.all_gather_object(owned, description, group=groups.pp_group)
    for stage, parameters in enumerate(owned):
        for name, dtype, shape in parameters or []:
            if stage == groups.pp_rank:
                shard = mine[name].detach().contiguous()
            else:
                shard = torch.empty(shape, dtype=dtype, device=groups.device)
            if groups.pp_size > 1:
                dist.broadcast(shard, dist.get_global_rank(groups.pp_group, stage), group=groups.pp_group)
            shards = [torch.empty_like(shard) for _ in range(groups.tp_size)]
            dist.all_gather(shards, shard, group=groups.tp_group)
            yield from export_parameter(name, arch, shards)


def _with_global_layer(name: str, offset: int) -> str:
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    layer, rest = name[len(prefix) :].split(".", 1)
    return f"{prefix}{int(layer) + offset}.{rest}"
