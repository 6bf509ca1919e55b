"""Writing the safetensors files of a Hugging Face model folder, a tensor at a time.

The names, dtypes and shapes of a model are known before its tensors: the headers are written first, and each
tensor then goes straight to its place (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from chord_megatron.weights.names import list_names
from chord_megatron.weights.safetensors_io import DTYPES, INDEX_FILE, SINGLE_FILE
from chord_megatron.weights.schema import TensorSpec

MAX_SHARD_BYTES = 5 * 10**9  # what save_pretrained means by its default of "5GB"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# At once: larger writes make ext4 look for larger runs of free memory, which took up to twice the time (Linux 6.18).
WRITE_BYTES = 256 * 2**10


class SafetensorsWriter:
    """Writes tensors, or some rows of them, in any order. A context manager that closes the files.

    Under the directory the shards are files named 0, 1, ... until `publish`.
    """

    def __init__(
        self, directory: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._directory = directory
        self._specs = specs
        self._shards = _plan_shards(specs, max_shard_bytes)
        self._missing = {name: spec.nbytes for name, spec in specs.items()}
        self._place: dict[str, tuple[int, int]] = {}  # name -> file descriptor, offset
        with ExitStack() as stack:
            for number, names in enumerate(self._shards):
                file = stack.enter_context((directory / str(number)).open("wb"))
                header, offsets = _header(specs, names)
                _write_at(file.fileno(), memoryview(header), 0)
                self._place |= {name: (file.fileno(), len(header) + offset) for name, offset in offsets.items()}
            self._stack = stack.pop_all()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; ValueError where it is not the one that was planned, or comes again."""
        spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if name not in self._specs:
            raise ValueError(f"{name} is not a planned tensor")
        if spec != self._specs[name]:
            raise ValueError(f"{name} is {_text(spec)} and was planned as {_text(self._specs[name])}")
        self.write_rows(name, tensor, 0)

    def write_rows(self, name: str, rows: Tensor, first: int) -> None:
        """Write some rows of a tensor; ValueError where that is more than the tensor has."""
        spec = self._specs[name]
        if rows.dtype != spec.dtype or tuple(rows.shape[1:]) != spec.shape[1:] or rows.nbytes > self._missing[name]:
            raise ValueError(f"{name} is written twice, or not as {_text(spec)}")
        raw = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        descriptor, start = self._place[name]
        row_bytes = rows.nbytes // max(1, len(rows)) if first else 0
        _write_at(descriptor, raw.data, start + first * row_bytes)
        self._missing[name] -= rows.nbytes

    def publish(self, target: Path) -> None:
        """Give the files their final names in `target`, in place of earlier weights there; ValueError if any lacks."""
        if missing := [name for name, nbytes in self._missing.items() if nbytes]:
            raise ValueError(f"tensors that were planned and not written: {list_names(missing)}")
        self._stack.close()  # a network file system may report a full disk here
        for stale in (target / SINGLE_FILE, target / INDEX_FILE, *target.glob("model-*-of-*.safetensors")):
            stale.unlink(missing_ok=True)
        count = len(self._shards)
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE_FILE]
        for number, file in enumerate(files):
            (self._directory / str(number)).rename(target / file)
        if count > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self._specs.values())},
                "weight_map": {name: file for names, file in zip(self._shards, files) for name in names},
            }
            (target / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(
    directory: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Stream tensors into `directory` as Hugging Face does, holding one tensor in memory.

    Shards follow the order of `specs`; a tensor above `max_shard_bytes` gets a file of its own. Earlier weights in
    `directory` are replaced once everything is written; a failure before that leaves them as they were.
    ValueError: the tensors are not those of `specs`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as temporary,
        SafetensorsWriter(Path(temporary), specs, max_shard_bytes) as writer,
    ):
        for name, tensor in tensors:
            writer.write(name, tensor)
        writer.publish(directory)


def _plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """The names in each file."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _header(specs: Mapping[str, TensorSpec], names: list[str]) -> tuple[bytes, dict[str, int]]:
    """The start of a file, and the offset of each tensor behind it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    # Wide types first: then every tensor is aligned to its elements.
    for name in sorted(names, key=lambda name: -specs[name].dtype.itemsize):
        spec = specs[name]
        offsets[name], end = end, end + spec.nbytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data[:WRITE_BYTES], offset)
        data, offset = data[written:], offset + written


def _text(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"
