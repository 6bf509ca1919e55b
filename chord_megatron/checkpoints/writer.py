"""Writing a Megatron torch_dist checkpoint without a model or a process group, a tensor at a time.

It has a key for each layer (Megatron-Core's `non_homogeneous_layers`) and all experts of a layer under one key.
torch's FileSystemWriter is not used: it keeps every tensor of a file in memory until the file is finished
(`tensor_dict` in torch/distributed/checkpoint/filesystem.py), and loses errors of all threads but one. One thread
that writes from mapped memory is no slower than two.
"""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from chord_megatron.checkpoints.metadata import METADATA_FILE
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.mapping import find_mapping, hf_shapes
from chord_megatron.weights.safetensors_writer import WRITE_BYTES
from chord_megatron.weights.schema import TensorLayout, TensorSpec

_FILE_BYTES = 5 * 10**9
_PIECE_BYTES = 128 * 2**20
_ALIGNMENT = 64  # of numbers within a torch.save; aligned in the file, too, they can be read by mapping it
# What `sharded_state_dict` is told so that it names the same keys; Megatron-LM and Megatron-Bridge read it.
_CONTENT = {
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
# Megatron-LM takes an absent version for one with another order of the QKV rows (checkpointing.py).
_COMMON = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": _CONTENT}
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Piece:
    """What is written at once: some rows of a parameter."""

    name: str  # local-spec name
    dtype: torch.dtype
    shape: tuple[int, ...]
    first_row: int
    num_rows: int  # of the parameter

    @property
    def nbytes(self) -> int:
        return TensorSpec(self.dtype, self.shape).nbytes


@dataclass(frozen=True)
class _Place:
    """Where a piece belongs in a stored tensor."""

    key: str
    size: torch.Size  # of the stored tensor
    chunk: ChunkStorageMetadata

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.key, self.chunk.offsets)


def plan_pieces(specs: Mapping[str, TensorSpec], arch: ModelArchitecture) -> list[Piece]:
    """Pieces of all parameters; `specs` are of the full ones by local-spec name."""
    pieces = []
    for name, spec in specs.items():
        parameter = find_mapping(name, arch)
        num_rows, *rest = spec.shape
        if parameter.mapping.layout is TensorLayout.VOCAB:
            # Many times larger than the others: split, it needs no more memory than they, and a tensor-parallel
            # rank reads its own rows only.
            count = math.gcd(num_rows, 2 ** math.ceil(math.log2(max(spec.nbytes / _PIECE_BYTES, 1))))
            rows = [num_rows // count] * count
        elif parameter.mapping.layout is TensorLayout.QKV:
            rows = [num_rows]
        else:  # one Hugging Face tensor after the other: none needs to be copied
            rows = [shape[0] for shape in hf_shapes(parameter, arch).values()]
        starts = itertools.accumulate(rows, initial=0)
        pieces += [Piece(name, spec.dtype, (n, *rest), start, num_rows) for start, n in zip(starts, rows)]
    return pieces


def write_checkpoint(
    directory: Path, pieces: list[Piece], arch: ModelArchitecture, make: Callable[[Piece], Tensor]
) -> None:
    """Write a checkpoint into an existing folder; `make` gives each piece when its turn comes."""
    metadata = Metadata(state_dict_metadata={}, storage_data={}, storage_meta=StorageMeta())
    metadata.version = CURRENT_DCP_VERSION

    with _without_crc32():
        for number, of_file in enumerate(_split_into_files(pieces)):
            with (directory / f"__{number}_0.distcp").open("wb") as file:
                for piece in of_file:
                    place = _place(piece, arch)
                    _describe(metadata, place, piece.dtype)
                    tensor = make(piece).reshape(place.chunk.sizes)
                    metadata.storage_data[place.index] = _append(file, tensor, f"__{number}_0.distcp")
    with (directory / METADATA_FILE).open("wb") as file:
        pickle.dump(metadata, file)
    torch.save(_COMMON, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_BACKENDS), encoding="utf-8")


def _append(file: IO[bytes], tensor: Tensor, file_name: str) -> _StorageInfo:
    file.write(bytes(-file.tell() % _ALIGNMENT))
    start = file.tell()
    torch.save(_alone(tensor), cast(IO[bytes], _SmallWrites(file)))
    return _StorageInfo(file_name, start, file.tell() - start)


class _SmallWrites:
    """A file to which torch.save writes whole tensors, in parts; it calls nothing else of a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.flush = file.flush

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        for start in range(0, len(view), WRITE_BYTES):
            self._file.write(view[start : start + WRITE_BYTES])
        return len(view)


def _alone(tensor: Tensor) -> Tensor:
    """The same numbers, not copied, in a storage that holds no others: torch.save writes all of it."""
    tensor = tensor.contiguous()
    start = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage).view(tensor.shape)


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Leaves out checksums that torch.load never looks at, and which take as long as the rest."""
    earlier = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(earlier)


def _split_into_files(pieces: list[Piece]) -> list[list[Piece]]:
    """Runs of pieces of about the same size."""
    nbytes = sum(piece.nbytes for piece in pieces)
    limit = nbytes / math.ceil(nbytes / _FILE_BYTES)
    files: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if size >= limit:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += piece.nbytes
    return files


def _place(piece: Piece, arch: ModelArchitecture) -> _Place:
    parameter = find_mapping(piece.name, arch)
    rows, *rest = piece.shape
    size, offset, extent = [piece.num_rows, *rest], [piece.first_row, *(0 for _ in rest)], [rows, *rest]
    if parameter.expert is not None:
        assert arch.moe is not None
        size, offset, extent = [arch.moe.num_experts, *size], [parameter.expert, *offset], [1, *extent]
    chunk = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(extent))
    return _Place(parameter.name(parameter.mapping.checkpoint_key), torch.Size(size), chunk)


def _describe(metadata: Metadata, place: _Place, dtype: torch.dtype) -> None:
    entry = metadata.state_dict_metadata.setdefault(
        place.key, TensorStorageMetadata(TensorProperties(dtype=dtype), place.size, [])
    )
    assert isinstance(entry, TensorStorageMetadata)
    entry.chunks.append(place.chunk)
