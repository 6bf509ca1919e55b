"""A table that may be wider than the terminal: what does not fit follows in another one, and nothing is broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_EDGE, _RULES = 1, 3  # of a table, and of each column, in characters


@dataclass(frozen=True)
class WideTable:
    """Texts in rows. The first column tells the rows apart: each part has it. For `Console.print`.

    A text is folded only where it is longer than a line has room for.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    justify: Literal["left", "right"] = "left"  # of all columns but the first
    title: str | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        first, *others = self._widths(options.max_width)
        title, part, room = self.title, [0], options.max_width - _EDGE - _RULES - first
        left = room
        for place, width in enumerate(others, 1):
            if width + _RULES > left:
                yield self._part(part, title)
                title, part, left = None, [0], room
            part.append(place)
            left -= width + _RULES
        yield self._part(part, title)

    def _widths(self, available: int) -> list[int]:
        """Of each column, such that any other fits beside the first."""
        first, *others = [max(map(cell_len, texts)) for texts in zip(self.columns, *self.rows)]
        room = max(available - _EDGE - 2 * _RULES, 2)
        first = min(first, room - min(max(others, default=0), room // 2))
        return [first, *(min(width, room - first) for width in others)]

    def _part(self, places: Sequence[int], title: str | None) -> Table:
        table = Table(title=title, title_justify="left")
        for place in places:
            justify = self.justify if place else "left"
            table.add_column(Text(self.columns[place]), justify=justify, overflow="fold")
        for texts in self.rows:
            table.add_row(*(Text(texts[place]) for place in places))
        return table
