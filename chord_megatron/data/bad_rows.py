"""Rows that cannot be used: the run ends with the row's sentence, or they are skipped and counted by reason."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

from chord_megatron.config import OnBadRow
from chord_megatron.system.errors import UserError


class BadRow(Exception):
    """Why a row cannot be used: `reason` is the same for all rows of a kind, `detail` says what this one holds."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + detail)
        self.reason = reason


class BadRows:
    """The unusable rows of one data set, which may be of several files."""

    def __init__(self, source: str, on_bad_row: OnBadRow, whole: BadRows | None = None) -> None:
        """whole: those of a data set of which `source` is a file."""
        self._source, self._on_bad_row = source, on_bad_row
        self._place = "" if whole is None else f"{source} "
        self._places: dict[str, list[str]] = {} if whole is None else whole.places  # of each reason
        self._files: list[tuple[int, BadRows]] = []  # with the first row of each
        self.first = 0  # of the rows that were read, the one that is counted as 0
        self.lines: list[int] | None = None  # of the rows of a text file, from 1
        self.unit: Literal["line", "item"] = "line"  # what those are

    @property
    def places(self) -> dict[str, list[str]]:
        """Where rows could not be used, by the reason."""
        return self._places

    def of_file(self, source: str, first: int) -> BadRows:
        """Those of one of several files, whose rows begin with `first`."""
        self._files.append((first, BadRows(source, self._on_bad_row, self)))
        return self._files[-1][1]

    def at_row(self, index: int) -> AbstractContextManager[None]:
        """Around the use of a row, from 0. A BadRow ends it here: UserError, or the row is skipped."""
        index += self.first
        if self._files:
            first, file = self._files[bisect_right(self._files, index, key=lambda each: each[0]) - 1]
            return file.at_row(index - first)
        return self.at_line(self.lines[index]) if self.lines else self._at(f" row {index}", f"row {index}")

    def at_line(self, number: int) -> AbstractContextManager[None]:
        """Around the reading of a line, or of an item of a list, from 1."""
        suffix = f":{number}" if self.unit == "line" else f" item {number}"
        return self._at(suffix, f"{self.unit} {number}")

    @contextmanager
    def _at(self, suffix: str, place: str) -> Iterator[None]:
        try:
            yield
        except (BadRow, RecursionError) as error:
            bad = error if isinstance(error, BadRow) else BadRow("nested too deeply")
            if self._on_bad_row == "stop":
                raise UserError(f"{self._source}{suffix}: {bad}; mend the row, or set data.on_bad_row=skip") from None
            self._places.setdefault(bad.reason, []).append(self._place + place)

    @property
    def count(self) -> int:
        return sum(map(len, self._places.values()))

    def __str__(self) -> str:
        """How many of each kind, and where the first is."""
        kinds = (f"{len(places)} {reason} (first: {places[0]})" for reason, places in self._places.items())
        return ", ".join(kinds)
