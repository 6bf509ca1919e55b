"""Reading and writing the safetensors files of a Hugging Face model folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chord_megatron.convert.architecture import ModelArchitecture
from chord_megatron.convert.families import hf_names, is_ignorable
from chord_megatron.convert.shards import TensorSlice
from chord_megatron.types import UserError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class SafetensorsReader:
    """The tensors of a model folder, one file or sharded; files open on first use. A context manager.

    UserError names a missing or damaged file, and a missing tensor.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._file_of = self._read_weight_map()

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.clear()
        self._stack.close()

    def names(self) -> set[str]:
        """Names of all tensors in the folder."""
        return set(self._file_of)

    def get_slice(self, name: str) -> TensorSlice:
        """The tensor on disk; indexing it reads only what is asked for."""
        if name not in self._file_of:
            raise UserError(f"{self._directory} has no tensor {name}; download the model again.")
        try:
            return self._open(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(
                f"{self._directory / self._file_of[name]} lacks {name}, which the index promises; "
                "download the model again."
            ) from error

    def _read_weight_map(self) -> dict[str, str]:
        if (self._directory / _SINGLE).is_file():
            return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        index = self._directory / _INDEX
        if not index.is_file():
            raise UserError(
                f"{self._directory} has neither {_SINGLE} nor {_INDEX}; save the model with save_pretrained."
            )
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is not a safetensors index; download it again.") from error
        absent = sorted({file for file in weight_map.values() if not (self._directory / file).is_file()})
        if absent:
            raise UserError(f"{self._directory} lacks {_some(absent)}; download the model again.")
        return weight_map

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                handle = self._stack.enter_context(safe_open(self._directory / file, framework="pt"))
            except SafetensorError as error:
                raise UserError(
                    f"{self._directory / file} is not a complete safetensors file ({error}); "
                    "download it again (a Git LFS pointer looks like this)."
                ) from error
            self._files[file] = handle
        return self._files[file]


def check_complete(reader: SafetensorsReader, arch: ModelArchitecture) -> None:
    """Every tensor of the model is there and no other; UserError lists the names."""
    expected, found = hf_names(arch), reader.names()
    missing = sorted(expected - found)
    if missing:
        raise UserError(f"the checkpoint lacks tensors of a {arch.family} model: {_some(missing)}; download it again.")
    unexpected = sorted(name for name in found - expected if not is_ignorable(name, arch))
    if unexpected:
        raise UserError(
            f"the checkpoint has tensors that a {arch.family} model does not: {_some(unexpected)}; "
            "use the config.json that belongs to these weights."
        )


def write_safetensors(directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = 5 * 2**30) -> None:
    """Stream tensors into `directory` as Hugging Face does, holding one shard in memory.

    A tensor above `max_shard_bytes` gets a file of its own. Earlier weights in `directory` are replaced
    once everything is written; a failure before that leaves them as they were.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, int] = {}
    total_bytes = shard_bytes = count = 0
    shard: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as temporary:

        def flush() -> None:
            path = Path(temporary) / str(count)
            path.touch()
            mode = path.stat().st_mode  # safetensors 0.8 writes files that only their owner can read
            save_file(shard, path, metadata={"format": "pt"})
            path.chmod(mode)
            shard.clear()

        for name, tensor in tensors:
            assert name not in weight_map, f"{name} is written twice"
            if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
                flush()
                count, shard_bytes = count + 1, 0
            shard[name] = tensor.detach().cpu().contiguous()
            weight_map[name] = count
            shard_bytes += tensor.nbytes
            total_bytes += tensor.nbytes
        flush()
        _publish(Path(temporary), directory, weight_map, total_bytes)


def _publish(temporary: Path, directory: Path, weight_map: dict[str, int], total_bytes: int) -> None:
    """Give the shards, files named 0, 1, ..., their final names in `directory`, and write the index."""
    for stale in (directory / _SINGLE, directory / _INDEX, *directory.glob("model-*-of-*.safetensors")):
        stale.unlink(missing_ok=True)
    count = max(weight_map.values(), default=0) + 1
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [_SINGLE]
    for number, name in enumerate(names):
        (temporary / str(number)).rename(directory / name)
    if count > 1:
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {tensor: names[number] for tensor, number in weight_map.items()},
        }
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _some(names: list[str]) -> str:
    """The first five names, and how many there are."""
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else f" ({len(names)})")
