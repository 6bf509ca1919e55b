"""A weight update as files that trainer and servers both see: in memory (/dev/shm) on one node, else on a shared disk.

A bucket of tensors is one safetensors file. Whoever maps it sees the bytes without a copy, and keeps them when the file
is removed. Their directory is locked as long as its trainer lives: the system frees the lock of a killed one, also in
containers that share /dev/shm and not the numbers of processes.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chord_megatron.system.errors import UserError

_DIRECTORY = re.compile(r"chord-weights-[0-9a-f]{32}")
_FILE = re.compile(r"\d+\.safetensors")


@contextmanager
def weight_directory(parent: Path) -> Iterator[Path]:
    """A directory for an update, removed at the end. Raises UserError where there can be none."""
    directory = parent / f"chord-weights-{uuid4().hex}"
    unlocked = directory.with_name(f".{directory.name}")  # a name that nobody takes for an abandoned one
    try:
        unlocked.mkdir(parents=True)
        lock = os.open(unlocked, os.O_RDONLY)
        with suppress(OSError):  # a disk without locks, where nobody gets one either
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlocked.rename(directory)
    except OSError as error:
        raise UserError(
            f"rollout.weight_transfer_dir: {parent} cannot be written ({error.strerror}); name another"
        ) from None
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Remove the files of weight directories of this user that no trainer holds: of those that were killed."""
    with suppress(OSError):
        for directory in parent.iterdir():
            if _DIRECTORY.fullmatch(directory.name):
                with suppress(OSError):  # somebody's else, in use, or removed in the meantime
                    _remove_if_abandoned(directory)


def _remove_if_abandoned(directory: Path) -> None:
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        names = os.listdir(opened)
        if os.fstat(opened).st_uid == os.getuid() and all(map(_FILE.fullmatch, names)):
            for name in names:
                os.unlink(name, dir_fd=opened)
            directory.rmdir()
    finally:
        os.close(opened)


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
