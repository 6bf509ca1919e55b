"""Between full Hugging Face tensors and the tensor-parallel shards of Megatron parameters, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.mapping import find_mapping, hf_shapes
from chord_megatron.weights.schema import TensorLayout


class TensorSlice(Protocol):
    """A tensor on disk (safetensors' PySafeSlice): indexing reads only the rows or columns asked for."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, index: Any) -> Tensor: ...


def import_parameter(
    name: str,
    arch: ModelArchitecture,
    read: Callable[[str], TensorSlice],
    *,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
) -> Tensor:
    """This rank's shard of a Megatron parameter, in the dtype of the file.

    `name` carries the global layer number, under the local or the Transformer Engine spec; `read(hf_name)`
    gives the slice-able tensor, of which only this rank's part is read. `padded_vocab_size` counts rows
    over all ranks. UserError: unknown parameter, wrong shape, or a size that `tp_size` does not divide.
    """
    parameter = find_mapping(name, arch)
    layout = parameter.mapping.layout
    if layout is TensorLayout.REPLICATED:
        tp_rank, tp_size = 0, 1
    parts = []
    for hf_name, shape in hf_shapes(parameter, arch).items():
        source = read(hf_name)
        _check_shape(hf_name, shape, source.get_shape())
        dim = _split_dim(layout)
        extent = padded_vocab_size if layout is TensorLayout.VOCAB else shape[dim]
        # A rank holds whole query groups, although their rows may be divisible further.
        _check_divisible(hf_name, arch.num_query_groups if layout is TensorLayout.QKV else extent, tp_size)
        assert extent >= shape[dim], f"padded_vocab_size {extent} is below vocab_size {shape[dim]}"
        parts.append(_read_part(source, dim, shape[dim], tp_rank, extent // tp_size))
    return _interleave_qkv(parts, arch) if layout is TensorLayout.QKV else torch.cat(parts)


def export_parameter(name: str, arch: ModelArchitecture, shards: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """The full Hugging Face tensors of a Megatron parameter, as copies and without vocabulary padding.

    `shards` are those of all tensor-parallel ranks in rank order; of a replicated parameter the first is
    taken. Nothing is returned for the output layer of a tied model. UserError: unknown parameter or
    wrong shape.
    """
    parameter = find_mapping(name, arch)
    mapping = parameter.mapping
    if mapping.is_copy:
        return []
    if mapping.layout is TensorLayout.REPLICATED:
        shards = shards[:1]
    shapes = hf_shapes(parameter, arch)
    dim = _split_dim(mapping.layout)
    _check_shards(name, mapping.layout, list(shapes.values()), shards, arch)
    split = _SPLITS.get(mapping.layout, lambda shard, arch: (shard,))
    parts_by_rank = [split(shard.detach(), arch) for shard in shards]
    full = [torch.cat(parts, dim) for parts in zip(*parts_by_rank)]
    return [(hf_name, tensor[: shape[0]]) for (hf_name, shape), tensor in zip(shapes.items(), full)]


def _split_dim(layout: TensorLayout) -> int:
    return 1 if layout is TensorLayout.ROW else 0


def _read_part(source: TensorSlice, dim: int, size: int, rank: int, width: int) -> Tensor:
    """Entries [rank * width, (rank + 1) * width) along `dim`; beyond `size` there are zero rows."""
    start, end = min(rank * width, size), min((rank + 1) * width, size)
    part = source[start:end] if dim == 0 else source[:, start:end]
    padding = width - (end - start)
    return torch.cat([part, part.new_zeros(padding, *part.shape[1:])]) if padding else part


def _interleave_qkv(parts: Sequence[Tensor], arch: ModelArchitecture) -> Tensor:
    """q, k, v, each [groups * heads * head_dim, ...] -> rows in the order q.. k v of each query group."""
    groups = parts[1].shape[0] // arch.head_dim
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _split_qkv(shard: Tensor, arch: ModelArchitecture) -> Sequence[Tensor]:
    """The inverse of `_interleave_qkv`."""
    rows = [arch.num_attention_heads // arch.num_query_groups * arch.head_dim, arch.head_dim, arch.head_dim]
    return [part.flatten(0, 1) for part in shard.unflatten(0, (-1, sum(rows))).split(rows, dim=1)]


_SPLITS: dict[TensorLayout, Callable[[Tensor, ModelArchitecture], Sequence[Tensor]]] = {
    TensorLayout.QKV: _split_qkv,
    TensorLayout.GATE_UP: lambda shard, arch: shard.chunk(2),
}


def _check_shape(name: str, expected: Sequence[int], actual: Sequence[int]) -> None:
    if list(expected) != list(actual):
        raise UserError(
            f"{name} has shape {list(actual)} where config.json asks for {list(expected)}; "
            "use the config.json that belongs to these weights."
        )


def _check_divisible(name: str, size: int, tp_size: int) -> None:
    if size % tp_size:
        raise UserError(
            f"{name} cannot be split over {tp_size} tensor-parallel ranks ({size} is not a multiple); "
            f"choose a tensor_model_parallel_size that divides {size}."
        )


def _check_shards(
    name: str,
    layout: TensorLayout,
    shapes: list[tuple[int, ...]],
    shards: Sequence[Tensor],
    arch: ModelArchitecture,
) -> None:
    dim = _split_dim(layout)
    expected = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
    actual = list(shards[0].shape)
    actual[dim] = sum(shard.shape[dim] for shard in shards)
    if layout is TensorLayout.VOCAB:
        actual[0] = min(actual[0], arch.vocab_size)  # the rest is padding
    _check_shape(name, expected, actual)
