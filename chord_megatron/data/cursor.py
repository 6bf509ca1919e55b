"""A position in an endless shuffled stream of rows, which a checkpoint can save."""

from __future__ import annotations

import numpy as np

from chord_megatron.system.errors import UserError


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
            rows.extend(taken)
        return rows

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
        self._order: list[int] = np.argsort(keys, kind="stable").tolist()
