"""A folder that appears complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chord_megatron.types import UserError

_SPARE_BYTES = 100 * 10**6  # headers and tokenizer


@contextmanager
def new_directory(target: Path, nbytes: int) -> Iterator[Path]:
    """A temporary folder beside `target` that is renamed to it at the end, or removed on any error or interrupt.

    UserError: `target` exists, its parent cannot be written, or the disk has not room for `nbytes`.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; remove it or name another folder")
    partial = target.absolute().with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _check_space(partial, nbytes)
        yield partial
        partial.rename(target)
    except Exception as error:
        if (cause := _os_error(error)) is None:
            raise
        raise UserError(_explain(cause, target)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_space(directory: Path, nbytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < nbytes + _SPARE_BYTES:
        raise UserError(
            f"{directory.parent} has {free / 1e9:.1f} GB free and {nbytes / 1e9:.1f} GB are needed; "
            "free some space or name another disk"
        )


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind one of torch, which reports a failed write as RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _explain(error: OSError, target: Path) -> str:
    if error.errno == errno.ENOSPC:
        return f"the disk of {target} is full; nothing was written: free some space or name another disk"
    return f"{target} cannot be written ({error.strerror or error}); nothing was written"
