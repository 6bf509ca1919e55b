"""Files and folders that appear complete or not at all: written beside their place, then moved to it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from chord_megatron.system.errors import UserError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_WRITING = {*_NO_ROOM, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_SPARE_BYTES = 100 * 10**6  # headers and tokenizer


@contextmanager
def failed_writes_named(path: Path) -> Iterator[None]:
    """Within, `path` is written: where the operating system refuses that, a UserError says so."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = os_error(error)
        if cause is None or cause.errno not in _NO_WRITING:
            raise
        remedy = "make room" if cause.errno in _NO_ROOM else "mend that"
        raise UserError(
            f"{path} cannot be written ({cause.strerror}); {remedy}, and start the same command again"
        ) from error


def atomic_write(path: Path, chunks: Iterable[bytes]) -> None:
    """Replace `path` in one move: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    with failed_writes_named(path):
        try:
            with temporary.open("wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def partial_path(target: Path) -> Path:
    """Where `replaced_directory` writes first: the same path in all processes of a job, which may write there too."""
    return target.with_name(f"{target.name}.partial")


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place at the end, or is removed on any error or interrupt.

    What a killed process left of one before is removed.
    """
    partial = partial_path(target)
    shutil.rmtree(partial, ignore_errors=True)
    with _removed_unless_moved(partial):
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)


@contextmanager
def new_directory(target: Path, nbytes: int) -> Iterator[Path]:
    """The same for a `target` that must not exist; several processes may try at once.

    UserError: `target` exists, its parent cannot be written, or the disk has not room for `nbytes`.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; remove it or name another folder")
    partial = target.absolute().with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with _removed_unless_moved(partial):
            _check_space(partial, nbytes)
            yield partial
            partial.rename(target)
    except Exception as error:
        if (cause := os_error(error)) is None:
            raise
        raise UserError(_explain(cause, target)) from error


@contextmanager
def _removed_unless_moved(partial: Path) -> Iterator[None]:
    try:
        partial.mkdir(parents=True)
        yield
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_space(directory: Path, nbytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < nbytes + _SPARE_BYTES:
        raise UserError(
            f"{directory.parent} has {free / 1e9:.1f} GB free and {nbytes / 1e9:.1f} GB are needed; "
            "free some space or name another disk"
        )


def os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind another: torch reports a failed write as RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _explain(error: OSError, target: Path) -> str:
    if error.errno == errno.ENOSPC:
        return f"the disk of {target} is full; nothing was written: free some space or name another disk"
    return f"{target} cannot be written ({error.strerror or error}); nothing was written"
