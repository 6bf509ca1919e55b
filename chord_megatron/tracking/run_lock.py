"""One run at a time in a directory: a lock that says who holds it, and signs of life for those on other hosts."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from chord_megatron.system.errors import UserError

LOCK_FILE = "lock"
_SECONDS_BETWEEN_BEATS = 10.0
_SECONDS_OF_SILENCE = 60.0  # after which a run on another host is taken for ended
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems


@dataclass(frozen=True)
class Holder:
    """Whose run it is."""

    host: str
    process: int
    since: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}"


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold a run's directory, which is made if need be; nothing is left of the lock, nor of a directory left empty.

    The kernel gives the lock of a process back that ends in any way. Whether other hosts learn of it depends on the
    file system (NFS: yes, unless mounted with `nolock` or `local_lock`), so the holder also moves the file's time on.
    Raises UserError where another run holds it, or where nothing can be written.
    """
    ended = threading.Event()
    made = _make(directory)
    try:
        descriptor = _acquire(directory / LOCK_FILE)
        beat = threading.Thread(target=_beat, args=(descriptor, ended), daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            (directory / LOCK_FILE).unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        for folder in made:
            with suppress(OSError):  # the run has written to it
                folder.rmdir()


def refuse_used(directory: Path) -> None:
    """Raise UserError where another run holds the directory, which stays as it is."""
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR)
    except OSError:  # there is none, or whoever wants to hold it says why that is impossible
        return
    try:
        _refuse_if_used(directory / LOCK_FILE, descriptor)
    finally:
        os.close(descriptor)


def _make(directory: Path) -> list[Path]:
    """Make it; the directories that were not there, the innermost first."""
    missing = [place for place in (directory, *directory.absolute().parents) if not place.exists()]
    existing = directory.absolute() if not missing else missing[-1].absolute().parent
    if not existing.is_dir():
        raise UserError(f"{existing} is a file; choose another train.output_dir")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train.output_dir {directory} cannot be made: {error.strerror}") from None
    return missing


def _acquire(path: Path) -> int:
    """The descriptor of the locked file."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"train.output_dir {path.parent} cannot be written: {error.strerror}") from None
        try:
            _refuse_if_used(path, descriptor)
            if _is_at(path, descriptor):
                _sign(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has ended meanwhile, and removed it


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _refuse_if_used(path: Path, descriptor: int) -> None:
    holder = _read(descriptor)
    is_ours = _try_lock(descriptor)
    is_of_this_host = holder is None or holder.host == platform.node()
    if is_ours is not None and is_of_this_host:  # the kernel knows
        is_used, is_silent = not is_ours, False
    else:
        is_used = holder is not None and _shows_life(path, holder)
        is_silent = not is_used and is_ours is False and not _try_lock(descriptor)
    if is_silent:
        raise UserError(
            f"{path.parent} is in use by {holder}; it gives no sign of life: if it has ended, remove {path}, else "
            "choose another train.output_dir"
        )
    if is_used:
        raise UserError(
            f"{path.parent} is in use by {holder or 'another run'}; end that run, or choose another train.output_dir"
        )


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _shows_life(path: Path, holder: Holder) -> bool:
    """Watch the file's time until its holder moves it on, or has been silent for long."""
    print(f"{path} is of {holder}: waiting {_SECONDS_OF_SILENCE:.0f} s for a sign of its life", flush=True)
    before, deadline = _time_of(path), time.monotonic() + _SECONDS_OF_SILENCE
    while time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_BEATS / 2)
        if _time_of(path) not in (before, None):
            return True
    return False


def _time_of(path: Path) -> int | None:
    """By opening it: NFS keeps what it knows of a file's time until then."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _read(descriptor: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _sign(descriptor: int) -> None:
    holder = Holder(platform.node(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))
    text = json.dumps(asdict(holder)).encode()
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(_SECONDS_BETWEEN_BEATS):
        with suppress(OSError):
            os.utime(descriptor)
