"""A weight update as files that trainer and engine both see: in memory (/dev/shm) on one node, else on a shared disk.

A bucket of tensors is one safetensors file, named by version and number. Whoever maps it sees the bytes without a
copy, and keeps them when the file is removed.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from chord_megatron.rollout.manifest import checksum
from chord_megatron.types import UserError


@dataclass(frozen=True)
class WeightFile:
    """One bucket of an update."""

    path: Path
    checksums: dict[str, str]  # by tensor, in the order of the update


def write_weight_files(
    weights: Iterable[tuple[str, Tensor]], directory: Path, *, bucket_bytes: int
) -> Iterator[WeightFile]:
    """Write one bucket at a time into a new `directory`; a file is removed when the next is asked for.

    Raises UserError where there is no room.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        for number, bucket in enumerate(_buckets(weights, bucket_bytes)):
            path = directory / f"{number}.safetensors"
            _save(bucket, path)
            yield WeightFile(path, {name: checksum(tensor) for name, tensor in bucket.items()})
            path.unlink()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def read_weight_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a bucket, mapped from the file."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            yield name, file.get_tensor(name)


def _buckets(weights: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor.contiguous()
        size += tensor.nbytes
    if bucket:
        yield bucket


def _save(bucket: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(bucket, path)
    except Exception as error:  # safetensors raises its own kind, with the system's message inside
        size = sum(tensor.nbytes for tensor in bucket.values())
        free = shutil.disk_usage(path.parent).free
        if free < size or getattr(error, "errno", None) == errno.ENOSPC:
            raise UserError(
                f"rollout.weight_transfer_dir: no room for {size:,} bytes in {path.parent} ({free:,} bytes free); "
                "enlarge it (docker run --ipc=host or --shm-size), lower model.export_bucket_megabytes, or name another"
            ) from None
        raise
