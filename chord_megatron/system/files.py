"""JSON lines that survive a kill: flushed one by one. JSON files of others, whatever they hold."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from chord_megatron.system.atomic import atomic_write, failed_writes_named
from chord_megatron.system.errors import UserError

_LFS_POINTER = b"version https://git-lfs"


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file begins like what Git leaves in place of a large one."""
    return content.startswith(_LFS_POINTER)


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file of somebody else's. Raises UserError, which ends in `remedy`, where it holds none."""
    try:
        content = path.read_bytes()
        if is_lfs_pointer(content):
            raise UserError(f"{path} is a Git LFS pointer, not the file; run `git lfs pull` there")
        document = json.loads(content.decode("utf-8"))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {remedy}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid JSON (nested too deeply); {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} does not hold a JSON object; {remedy}")
    return document


class FilePart(io.RawIOBase):
    """Some bytes of a file as a file of their own, to be read."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._place)
        content = self._file.read(max(0, min(len(buffer), self._length - self._place)))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


class AppendedFile:
    """A file that grows: what is written is with the system before `write` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)  # so that nothing of a failed write is left to be written

    def write(self, content: bytes) -> None:
        """Append all of it. Raises UserError."""
        with failed_writes_named(self._path):
            while content:
                content = content[self._file.write(content) :]

    def close(self) -> None:
        self._file.close()


class JsonLines:
    """Appends strict JSON objects to a file, one per line, each on disk before `write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = AppendedFile(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object. Non-finite numbers become null, because JSON has no NaN. Raises UserError."""
        self._file.write(_encode(record))

    def close(self) -> None:
        self._file.close()


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file of a run, each of a `step`; none when it is missing.

    A last line torn by a kill is left out. Raises UserError when any other line is not a JSON object, or has no step.
    """
    if not path.exists():
        return
    damaged = None
    try:
        opened = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    with opened as file:
        for number, line in enumerate(file, start=1):
            if damaged is not None:
                raise UserError(f"line {damaged} of {path} is not a JSON object; remove that line")
            record = _decode(line)
            if record is None:
                damaged = number
            elif type(step := record.get("step")) is not int or not 0 <= step < 2**53:
                raise UserError(f"line {number} of {path} has no step (an integer from 0 on); remove that line")
            else:
                yield record


def filter_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON-lines file with the objects that `keep` accepts. A missing file stays missing."""
    if path.exists():
        atomic_write(path, (_encode(record) for record in read_json_lines(path) if keep(record)))


def finite(value: Any) -> Any:
    """The value with every NaN and infinity in it replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def json_text(document: Any) -> str:
    """What a command prints as JSON: strict, on as many lines as it takes, in characters that every terminal has."""
    return json.dumps(finite(document), indent=2, allow_nan=False)


def _encode(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(finite(record), allow_nan=False, ensure_ascii=False)
    # A lone surrogate has no UTF-8 form; its backslash form is the JSON escape for it.
    return f"{text}\n".encode("utf-8", errors="backslashreplace")


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also the UnicodeDecodeError of a character cut in half
        return None
    return record if isinstance(record, dict) else None
