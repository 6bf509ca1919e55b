"""The rows of a batch that count, in dense blocks; under sequence parallelism they travel from and to their owners.

Rows that do not count are dropped before they are moved or multiplied. A block has full size whatever the number
of ranks and wherever its rows lie, because short blocks starve the matrix multiplication; of all the rows that
other ranks own, two blocks exist at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TokenBlocks:
    """`index`: the rows that count, [count] int64 in ascending order; None = all of the batch's `total` rows.

    group: the ranks that work on the same rows. sequence_parallel: each of them holds its own total / size rows,
    in order; otherwise each holds all. Blocks are slices of positions among the rows that count.
    """

    index: Tensor | None
    total: int
    block_tokens: int
    group: dist.ProcessGroup | None
    sequence_parallel: bool

    @property
    def count(self) -> int:
        return self.total if self.index is None else len(self.index)

    @property
    def group_size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only some of the rows."""
        return self.sequence_parallel and self.group_size > 1

    def subset(self, keep: Tensor) -> tuple[TokenBlocks, Tensor | None]:
        """The rows where `keep` ([count] bool) is true, and their positions among the present ones; None = all."""
        positions = keep.nonzero().squeeze(1)  # a GPU is waited for here
        if len(positions) == self.count:
            return self, None
        index = positions if self.index is None else self.index[positions]
        return replace(self, index=index), positions

    def spread(self, values: Tensor) -> Tensor:
        """[total]: `values` ([count]) at the rows that count, 0 at the others."""
        return values if self.index is None else values.new_zeros(self.total).index_copy_(0, self.index, values)

    def fetch(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield each block with its rows of `hidden`, while the next one is already under way.

        All ranks of the group must run through all blocks.
        """
        upcoming: deque[tuple[slice, Tensor, list[dist.Work]]] = deque()
        for start in range(0, self.count, self.block_tokens):
            block = slice(start, min(start + self.block_tokens, self.count))
            upcoming.append((block, *self._start_fetch(hidden, block)))
            if len(upcoming) > 1:
                yield _arrived(*upcoming.popleft())
        while upcoming:
            yield _arrived(*upcoming.popleft())

    def _start_fetch(self, hidden: Tensor, block: slice) -> tuple[Tensor, list[dist.Work]]:
        if not self.sharded:
            return hidden[self.local_rows(block)], []
        rows = hidden.new_empty(block.stop - block.start, hidden.shape[1])
        works = []
        for owner, part in self.parts(block):
            view = rows[_within(part, block)]
            if owner == self.rank:
                view.copy_(hidden[self.local_rows(part)])
            assert self.group is not None
            source = dist.get_global_rank(self.group, owner)
            works.append(dist.broadcast(view, source, group=self.group, async_op=True))
        return rows, works

    def local_rows(self, part: slice) -> slice | Tensor:
        """Which rows of this rank's tensor the positions `part`, all its own, are."""
        first = self.rank * (self.total // self.group_size) if self.sharded else 0
        if self.index is None:
            return slice(part.start - first, part.stop - first)
        return self.index[part] - first

    def parts(self, block: slice) -> list[tuple[int, slice]]:
        """(owner, its part of the block) in order of the ranks, without the empty parts."""
        cut = [(max(start, block.start), min(stop, block.stop)) for start, stop in pairwise(self._starts)]
        return [(owner, slice(start, stop)) for owner, (start, stop) in enumerate(cut) if start < stop]

    @cached_property
    def _starts(self) -> list[int]:
        """Position of each rank's first row among those that count, and the end."""
        firsts = [rank * (self.total // self.group_size) for rank in range(self.group_size + 1)]
        if self.index is None:
            return firsts
        return torch.searchsorted(self.index, self.index.new_tensor(firsts)).tolist()


class BlockGradients:
    """Sums the gradients of each block over the ranks and puts them into `gradients`, this rank's rows.

    The sum of one block is under way while the caller computes the next.
    """

    def __init__(self, blocks: TokenBlocks, gradients: Tensor) -> None:
        self.blocks = blocks
        self.gradients = gradients
        self._pending: deque[tuple[slice, Tensor, list[dist.Work]]] = deque()

    def add(self, block: slice, rows: Tensor) -> None:
        """rows: [block, H], this rank's part of the sum; not to be used by the caller any more."""
        self._pending.append((block, rows, self._start_sum(block, rows)))
        if len(self._pending) > 1:
            self._store()

    def finish(self) -> Tensor:
        while self._pending:
            self._store()
        return self.gradients

    def _start_sum(self, block: slice, rows: Tensor) -> list[dist.Work]:
        group = self.blocks.group
        if group is None or group.size() == 1:
            return []
        if not self.blocks.sharded:
            return [dist.all_reduce(rows, group=group, async_op=True)]
        return [
            dist.reduce(rows[_within(part, block)], dist.get_global_rank(group, owner), group=group, async_op=True)
            for owner, part in self.blocks.parts(block)
        ]

    def _store(self) -> None:
        block, rows = _arrived(*self._pending.popleft())
        parts = self.blocks.parts(block) if self.blocks.sharded else [(self.blocks.rank, block)]
        for owner, part in parts:
            if owner == self.blocks.rank:
                self.gradients[self.blocks.local_rows(part)] = rows[_within(part, block)].to(self.gradients.dtype)


def _within(part: slice, block: slice) -> slice:
    return slice(part.start - block.start, part.stop - block.start)


def _arrived(block: slice, rows: Tensor, works: list[dist.Work]) -> tuple[slice, Tensor]:
    for work in works:
        work.wait()
    return block, rows
