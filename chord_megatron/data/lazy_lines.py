"""Rows of a large .jsonl file, each read when it is asked for."""

from __future__ import annotations

import codecs
import hashlib
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

Row = Mapping[str, Any]

LARGE_FILE = 16 * 2**20  # bytes; a smaller file is read whole, which is quicker


class LazyLines(Sequence[Row]):
    """The rows of the lines that are not blank. `rows[i]` raises what `parse` does.

    The file stays open: a file that takes its name later is not read. Reading at a place, not mapping, so that a file
    that is cut short is an error of `parse`, not the end of the process.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], Row]) -> None:
        """Go through the file once. Raises OSError."""
        self._parse = parse
        self._starts, self._lengths = array("q"), array("q")
        self.lines = array("q")  # their numbers, from 1
        digest = hashlib.sha256()
        self._file = path.open("rb")
        start = 0
        for number, line in enumerate(self._file, 1):
            digest.update(line)
            skipped = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
            if not line[skipped:].isspace() and len(line) > skipped:
                self._starts.append(start + skipped)
                self._lengths.append(len(line) - skipped)
                self.lines.append(number)
            start += len(line)
        self.content = digest.hexdigest()  # of the whole file

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._parse(os.pread(self._file.fileno(), self._lengths[index], self._starts[index]))
