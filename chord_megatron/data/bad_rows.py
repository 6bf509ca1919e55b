"""Rows that cannot be used: the run ends with the row's sentence, or they are skipped and counted by reason."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
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
        self.source, self._on_bad_row = source, on_bad_row
        self._place = "" if whole is None else f"{source} "
        # Of each reason: how many rows, and the place of the first. A data set and its files have one.
        self.found: dict[str, tuple[int, str]] = {} if whole is None else whole.found
        # What was said of that first row, as far as it was read here.
        self.examples: dict[str, str] = {} if whole is None else whole.examples
        self._files: list[tuple[int, BadRows]] = []  # with the first row of each
        self.first = 0  # of the rows that were read, the one that is counted as 0
        self.lines: Sequence[int] | None = None  # of the rows of a text file, from 1
        self.unit: Literal["line", "item"] = "line"  # what those are

    def of_file(self, source: str, first: int) -> BadRows:
        """Those of one of several files, whose rows begin with `first`."""
        self._files.append((first, BadRows(source, self._on_bad_row, self)))
        return self._files[-1][1]

    @property
    def files(self) -> list[str]:
        """The names of several files, which are said with their rows."""
        return [file.source for _, file in self._files]

    def at_row(self, index: int) -> AbstractContextManager[None]:
        """Around the use of a row, from 0. A BadRow ends it here: UserError, or the row is skipped."""
        file, index = self._found_in(index)
        if file is not None:
            return file.at_row(index)
        return self.at_line(self.lines[index]) if self.lines else self._at(f" row {index}", f"row {index}")

    def place(self, index: int) -> str:
        """Where row `index`, from 0, is found: the line of a text file."""
        file, index = self._found_in(index)
        if file is not None:
            return file.place(index)
        return self._place + (f"{self.unit} {self.lines[index]}" if self.lines else f"row {index}")

    def _found_in(self, index: int) -> tuple[BadRows | None, int]:
        """The file of several that has a row, None where there is but one; and the number of the row there."""
        index += self.first
        if not self._files:
            return None, index
        first, file = self._files[bisect_right(self._files, index, key=lambda each: each[0]) - 1]
        return file, index - first

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
                raise UserError(f"{self.source}{suffix}: {bad}; mend the row, or set data.on_bad_row=skip") from None
            self.examples.setdefault(bad.reason, str(bad))
            self.add({bad.reason: (1, self._place + place)})

    def add(self, found: Mapping[str, tuple[int, str]]) -> None:
        """What was found further on."""
        for reason, (number, place) in found.items():
            before, first = self.found.get(reason, (0, place))
            self.found[reason] = (before + number, first)

    def taken(self) -> dict[str, tuple[int, str]]:
        """What was found until now; it no longer counts here."""
        found = dict(self.found)
        self.found.clear()
        return found

    @property
    def count(self) -> int:
        return sum(number for number, _ in self.found.values())

    def __str__(self) -> str:
        """How many of each kind, and where the first is."""
        kinds = (f"{number} {reason} (first: {first})" for reason, (number, first) in self.found.items())
        return ", ".join(kinds)
