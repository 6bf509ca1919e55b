"""Rows that cannot be used: the run ends with the row's sentence, or they are skipped and counted by reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from chord_megatron.config import OnBadRow
from chord_megatron.system.errors import UserError


class BadRow(Exception):
    """Why a row cannot be used: `reason` is the same for all rows of a kind, `detail` says what this one holds."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + detail)
        self.reason = reason


class BadRows:
    """The unusable rows of one data set."""

    def __init__(self, source: str, on_bad_row: OnBadRow) -> None:
        self._source, self._stops = source, on_bad_row == "stop"
        self.found: dict[str, tuple[int, str]] = {}  # of each reason: how many rows, and the place of the first
        self.examples: dict[str, str] = {}  # what was said of that first row, as far as it was read here
        self.lines: Sequence[int] | None = None  # of the rows of a text file, from 1

    def at_row(self, index: int) -> AbstractContextManager[None]:
        """Around the use of a row, from 0. A BadRow ends it here: UserError, or the row is skipped."""
        return self.at_line(self.lines[index]) if self.lines else self._at(f" {self.place(index)}", self.place(index))

    def place(self, index: int) -> str:
        """Where row `index`, from 0, is found: the line of a text file."""
        return f"line {self.lines[index]}" if self.lines else f"row {index}"

    def at_line(self, number: int) -> AbstractContextManager[None]:
        """Around the reading of a line, from 1."""
        return self._at(f":{number}", f"line {number}")

    @contextmanager
    def _at(self, suffix: str, place: str) -> Iterator[None]:
        try:
            yield
        except (BadRow, RecursionError) as error:
            bad = error if isinstance(error, BadRow) else BadRow("nested too deeply")
            if self._stops:
                raise UserError(f"{self._source}{suffix}: {bad}; mend the row, or set data.on_bad_row=skip") from None
            self.examples.setdefault(bad.reason, str(bad))
            self.add({bad.reason: (1, place)})

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
