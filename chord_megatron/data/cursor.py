"""A position in an endless shuffled stream of rows, which a checkpoint can save."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from chord_megatron.system.errors import UserError


class Cursor(Protocol):
    """Where a stream of rows stands."""

    def next(self, count: int) -> list[int]:
        """The next `count` row numbers."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on with the very next row, as plain JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position. Raises UserError where it belongs to other data or another seed."""
        ...


class ShuffledCursor:
    """Row numbers of a data set, epoch after epoch, each epoch in its own order.

    The order of epoch e depends on (seed, e, size) only: it sorts the first `size` raw 64-bit outputs of
    PCG64(SeedSequence([seed, e, size])). NumPy guarantees these two streams across releases (NEP 19), but
    not `Generator.permutation`.
    """

    def __init__(self, size: int, seed: int):
        assert size > 0 and seed >= 0
        self._size, self._seed = size, seed
        self._start(epoch=0, position=0)

    def next(self, count: int) -> list[int]:
        """The next `count` row numbers; a count beyond the end of an epoch goes on into the next ones."""
        rows: list[int] = []
        while len(rows) < count:
            if self._position == self._size:
                self._start(self._epoch + 1, position=0)
            taken = self._order[self._position : self._position + count - len(rows)]
            self._position += len(taken)
            rows.extend(taken.tolist())
        return rows

    @property
    def drawn(self) -> int:
        """Rows since the very first."""
        return self._epoch * self._size + self._position

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on with the very next row."""
        return {"size": self._size, "seed": self._seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position. Raises UserError where it belongs to other data or another seed."""
        for name, now in (("size", self._size), ("seed", self._seed)):
            if state[name] != now:
                raise UserError(
                    f"the data set or the seed changed since the checkpoint: {name} was {state[name]}, "
                    f"now {now}; restore it or start a new run"
                )
        epoch, position = state["epoch"], state["position"]
        if not (type(epoch) is type(position) is int and epoch >= 0 and 0 <= position <= self._size):
            raise UserError(f"the checkpoint is damaged: epoch {epoch!r}, row {position!r} is no place in the data set")
        self._start(epoch, position)

    def _start(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        keys = np.random.PCG64(np.random.SeedSequence([self._seed, epoch, self._size])).random_raw(self._size)
        self._order = np.argsort(keys, kind="stable")


class MixedCursor:
    """Row numbers of several sources that lie end to end, in the ratio of their weights.

    Each source is shuffled by itself. The next row is of the source with the smallest (drawn + 1/2) / weight, of equal
    ones the first: the divisors of Sainte-Laguë, by which no source is ever a whole row from its share where there are
    two. So a resumed run needs nothing but where each source stands.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        assert len(sizes) == len(weights) and min(weights) > 0
        # SeedSequence reads seeds in words of 32 bits; the first source has the order that it has alone.
        self._cursors = [ShuffledCursor(size, seed + (number << 32)) for number, size in enumerate(sizes)]
        self._starts = [0, *itertools.accumulate(sizes)]
        self._weights = list(weights)

    def next(self, count: int) -> list[int]:
        """The next `count` row numbers, those of a source counted on from the sources before it."""
        return [self._next() for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on with the very next row."""
        return {"weights": self._weights, "sources": [cursor.state_dict() for cursor in self._cursors]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position. Raises UserError where it belongs to other sources, weights or seeds."""
        before = state.get("weights", "those of one source")
        if before != self._weights:
            raise UserError(
                f"the sources or their weights changed since the checkpoint: weights were {before}, now "
                f"{self._weights}; restore them or start a new run"
            )
        for cursor, own in zip(self._cursors, state["sources"], strict=True):
            cursor.load_state_dict(own)

    def _next(self) -> int:
        shares = [(cursor.drawn + 0.5) / weight for cursor, weight in zip(self._cursors, self._weights)]
        source = shares.index(min(shares))
        return self._starts[source] + self._cursors[source].next(1)[0]
