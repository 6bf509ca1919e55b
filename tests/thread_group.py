"""A stand-in for torch.distributed whose ranks are threads: what ranks send each other, without processes.

A collective's result is there after `wait` and not before, so that a forgotten wait shows. Global rank: 10 + 2 * rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Group:
    """Stands for a process group."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._values: list[Tensor] = [torch.empty(0)] * size
        self._thread = threading.local()

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._thread.rank

    def one(self, rank: int) -> Group:
        """As that rank sees it, where nothing is exchanged."""
        self._thread.rank = rank
        return self

    def run(self, function: Callable[[], T]) -> list[T]:
        """The results of all ranks."""

        def as_rank(rank: int) -> T:
            self._thread.rank = rank
            try:
                return function()
            except BaseException:
                self._barrier.abort()  # the others must not wait for this one
                raise

        with ThreadPoolExecutor(self._size) as pool:
            return list(pool.map(as_rank, range(self._size)))

    def exchange(self, value: Tensor) -> list[Tensor]:
        """The values of all ranks, in order."""
        self._values[self.rank()] = value.detach().clone()
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


@dataclass(frozen=True)
class Work:
    """A collective under way."""

    wait: Callable[[], object]


def get_global_rank(group: Group, rank: int) -> int:
    return 10 + 2 * rank


def broadcast(tensor: Tensor, source: int, *, group: Group, async_op: bool) -> Work:
    values = group.exchange(tensor)
    assert async_op
    return Work(lambda: tensor.copy_(values[(source - 10) // 2]))


def reduce(tensor: Tensor, target: int, *, group: Group, async_op: bool) -> Work:
    total = torch.stack(group.exchange(tensor)).sum(0)
    assert async_op
    is_target = get_global_rank(group, group.rank()) == target
    return Work(lambda: tensor.copy_(total) if is_target else tensor.fill_(torch.nan))  # of no use elsewhere


def all_reduce(tensor: Tensor, *, group: Group, async_op: bool = False) -> Work | None:
    total = torch.stack(group.exchange(tensor)).sum(0)
    if async_op:
        return Work(lambda: tensor.copy_(total))
    tensor.copy_(total)
    return None


def all_gather(tensors: list[Tensor], tensor: Tensor, *, group: Group) -> None:
    for target, value in zip(tensors, group.exchange(tensor), strict=True):
        target.copy_(value)
