"""A weight update as files that trainer and servers both see: in memory (/dev/shm) on one node, else on a shared disk.

A bucket of tensors is one safetensors file. Whoever maps it sees the bytes without a copy, and keeps them when the file
is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chord_megatron.system.errors import UserError


def save_weight_file(bucket: Mapping[str, Tensor], path: Path) -> None:
    """Write one bucket. Raises UserError where there is no room."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(bucket), path)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in bucket.values())
        raise UserError(
            f"rollout.weight_transfer_dir: {size:,} bytes cannot be written to {path.parent} ({error}); enlarge "
            "it (docker run --ipc=host or --shm-size), lower model.export_bucket_megabytes, or name another"
        ) from None


def read_weight_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a bucket, mapped from the file."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            yield name, file.get_tensor(name)
