"""How far a process is in what it is doing: told by whoever does it, read by a thread that says so."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Work:
    """Plain numbers, so that telling costs nothing; a reader may see them a moment apart."""

    what: str = ""  # is counted, such as "completions"; without a total, what is waited for
    done: int = 0
    total: int = 0  # 0: nothing is counted
    before: int = 0  # of `done`: was there when counting began, such as what an earlier start has left
    began: float = field(default_factory=time.monotonic, compare=False)

    def begin(self, what: str = "", total: int = 0) -> None:
        """Something new, of which nothing is done yet; without arguments nothing is known."""
        self.what, self.done, self.total, self.before, self.began = what, 0, total, 0, time.monotonic()
