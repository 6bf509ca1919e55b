"""A weight update as files that trainer and servers both see: in memory (/dev/shm) on one node, else on a shared disk.

A bucket of tensors is one safetensors file. Whoever maps it sees the bytes without a copy, and keeps them when the file
is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chord_megatron.system.errors import UserError
from chord_megatron.system.held_folders import held_folder, remove_abandoned

_KIND = "chord-weights"


@contextmanager
def weight_directory(parent: Path) -> Iterator[Path]:
    """A directory for an update, removed at the end. Raises UserError where there can be none."""
    with ExitStack() as opened:
        try:
            directory = opened.enter_context(held_folder(parent, _KIND))
        except OSError as error:
            raise UserError(
                f"rollout.weight_transfer_dir: {parent} cannot be written ({error.strerror}); name another"
            ) from None
        yield directory


def remove_abandoned_weights(parent: Path) -> None:
    """Remove the weight directories of this user that no trainer holds: of those that were killed."""
    remove_abandoned(parent, _KIND, files=r"\d+\.safetensors")


def save_weight_file(bucket: Mapping[str, Tensor], path: Path) -> None:
    """Write one bucket. Raises UserError where there is no room."""
    try:
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
