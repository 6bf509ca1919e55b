"""Files that a thread writes while the program goes on."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PIECE_BYTES = 2**24  # between two looks at whether to go on


class BackgroundFiles:
    """What is added is written by a thread once it is started: in order, each file forced to the disk."""

    def __init__(self) -> None:
        self._files: list[tuple[Path, io.BytesIO]] = []
        self._error: Exception | None = None
        self._is_unwanted = False
        self._thread = threading.Thread(target=self._write, daemon=True, name="background files")

    @contextmanager
    def written(self) -> Iterator[None]:
        """The thread runs; it has ended behind the context, on an error or an interrupt before it is through."""
        self._thread.start()
        try:
            yield
        except BaseException:
            self._is_unwanted = True
            raise
        finally:
            self._thread.join()

    def add(self, path: Path, content: io.BytesIO) -> None:
        """Before it is started. The content is let go as soon as it is written."""
        self._files.append((path, content))

    @property
    def is_done(self) -> bool:
        """Whether it has written all, or has failed."""
        return not self._thread.is_alive()

    def wait(self) -> Exception | None:
        """Until it is done; what it failed by."""
        self._thread.join()
        return self._error

    def _write(self) -> None:
        try:
            while self._files and not self._is_unwanted:
                self._write_one(*self._files.pop(0))
        except Exception as error:  # told to whoever waits
            self._error = error

    def _write_one(self, path: Path, content: io.BytesIO) -> None:
        with path.open("wb") as file, content.getbuffer() as view:
            for start in range(0, len(view), _PIECE_BYTES):
                if self._is_unwanted:
                    return
                file.write(view[start : start + _PIECE_BYTES])
            file.flush()
            os.fsync(file.fileno())
