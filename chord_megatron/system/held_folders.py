"""Folders that go with their process: removed at its end, or, where it was killed, by the same user's next start.

Each is locked as long as its process lives: the system frees the lock of a killed one, also in containers that share a
file system and not the numbers of processes.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def held_folder(parent: Path, kind: str) -> Iterator[Path]:
    """A new folder `kind`-NUMBER in `parent`, which is made if need be. Raises OSError where there can be none."""
    folder = parent / f"{kind}-{uuid4().hex}"
    unlocked = folder.with_name(f".{folder.name}")  # a name that nobody takes for an abandoned one
    parent.mkdir(parents=True, exist_ok=True)
    unlocked.mkdir()
    lock = os.open(unlocked, os.O_RDONLY)
    with suppress(OSError):  # a disk without locks, where nobody gets one either
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    unlocked.rename(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned(parent: Path, kind: str, files: str) -> None:
    """Remove this user's folders of a kind that nobody holds, where all names in them match the pattern `files`."""
    with suppress(OSError):
        for folder in parent.iterdir():
            if re.fullmatch(rf"{kind}-[0-9a-f]{{32}}", folder.name):
                with suppress(OSError):  # somebody's else, in use, or removed in the meantime
                    _remove_if_abandoned(folder, files)


def _remove_if_abandoned(folder: Path, files: str) -> None:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        names = os.listdir(opened)
        if os.fstat(opened).st_uid == os.getuid() and all(re.fullmatch(files, name) for name in names):
            for name in names:
                os.unlink(name, dir_fd=opened)
            folder.rmdir()
    finally:
        os.close(opened)
