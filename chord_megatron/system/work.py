"""How far a process is in what it is doing: told by whoever does it, read by a thread that says so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Work:
    """Plain numbers, so that telling costs nothing; a reader may see them a moment apart."""

    what: str = ""  # is counted, such as "completions"; without a total, what is waited for
    done: int = 0
    total: int = 0  # 0: nothing is counted

    def begin(self, what: str = "", total: int = 0) -> None:
        """Something new, of which nothing is done yet; without arguments nothing is known."""
        self.what, self.done, self.total = what, 0, total
