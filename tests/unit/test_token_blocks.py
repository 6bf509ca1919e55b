"""Which rows travel where, by hand, and blocks that threads exchange in place of ranks."""

from __future__ import annotations

import pytest
import thread_group
import torch
from thread_group import Group, Work
from torch import Tensor

from chord_megatron.ops import token_blocks
from chord_megatron.ops.token_blocks import BlockGradients, TokenBlocks


@pytest.fixture(autouse=True)
def threads_for_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_blocks, "dist", thread_group)


def make_blocks(
    index: list[int] | None, total: int, block_tokens: int, group: Group | None = None, *, sharded: bool = True
) -> TokenBlocks:
    rows = None if index is None else torch.tensor(index, dtype=torch.int64)
    return TokenBlocks(rows, total, block_tokens, group, sequence_parallel=sharded)


# --- which rows -----------------------------------------------------------------------------------------------------


def test_counts_and_ranks_by_hand():
    group = Group(3).one(2)
    alone, all_rows, some = make_blocks(None, 12, 4), make_blocks(None, 12, 4, group), make_blocks([3, 8], 12, 4, group)
    assert (alone.count, alone.group_size, alone.rank, alone.sharded) == (12, 1, 0, False)
    assert (all_rows.count, all_rows.group_size, all_rows.rank, all_rows.sharded) == (12, 3, 2, True)
    assert some.count == 2
    assert not make_blocks(None, 12, 4, group, sharded=False).sharded
    assert not make_blocks(None, 12, 4, Group(1).one(0)).sharded


def test_subsets_of_subsets_name_rows_of_the_batch():
    blocks = make_blocks(None, 6, 4)
    some, positions = blocks.subset(torch.tensor([True, False, True, True, False, True]))
    assert some.index.tolist() == [0, 2, 3, 5] and positions.tolist() == [0, 2, 3, 5]
    fewer, positions = some.subset(torch.tensor([False, True, False, True]))
    assert fewer.index.tolist() == [2, 5] and positions.tolist() == [1, 3]
    assert (fewer.total, fewer.block_tokens) == (6, 4)
    none, positions = fewer.subset(torch.tensor([False, False]))
    assert none.count == 0 and positions.tolist() == []


@pytest.mark.parametrize("index", [None, [1, 4]])
def test_a_subset_of_all_rows_is_the_same_object(index: list[int] | None):
    blocks = make_blocks(index, 5, 4)
    assert blocks.subset(torch.ones(blocks.count, dtype=torch.bool)) == (blocks, None)


def test_spread_by_hand():
    values = torch.tensor([2.0, 3.0], dtype=torch.float64)
    spread = make_blocks([1, 3], 5, 4).spread(values)
    assert spread.tolist() == [0, 2, 0, 3, 0] and spread.dtype == torch.float64
    assert make_blocks(None, 2, 4).spread(values) is values


@pytest.mark.parametrize(
    ("index", "block", "expected"),
    [
        (None, (0, 12), [(0, 0, 4), (1, 4, 8), (2, 8, 12)]),
        (None, (3, 9), [(0, 3, 4), (1, 4, 8), (2, 8, 9)]),
        (None, (4, 8), [(1, 4, 8)]),  # a block that ends where a rank ends has no part of its neighbours
        # Rows 0 and 3 are rank 0's, 4 and 7 rank 1's, 8 and 11 rank 2's.
        ([0, 3, 4, 7, 8, 11], (0, 6), [(0, 0, 2), (1, 2, 4), (2, 4, 6)]),
        ([0, 3, 4, 7, 8, 11], (1, 5), [(0, 1, 2), (1, 2, 4), (2, 4, 5)]),
        ([1, 2, 9], (0, 3), [(0, 0, 2), (2, 2, 3)]),  # rank 1 has none
        ([], (0, 0), []),
    ],
)
def test_parts_by_hand(index: list[int] | None, block: tuple[int, int], expected: list[tuple[int, int, int]]):
    parts = make_blocks(index, 12, 4, Group(3).one(1)).parts(slice(*block))
    assert parts == [(owner, slice(start, stop)) for owner, start, stop in expected]


def test_local_rows_by_hand():
    group = Group(3).one(1)  # has the rows 4 to 7
    assert make_blocks(None, 12, 4, group).local_rows(slice(5, 8)) == slice(1, 4)
    assert make_blocks([0, 4, 7, 9], 12, 4, group).local_rows(slice(1, 3)).tolist() == [0, 3]
    # A rank that has all rows has them where they are.
    assert make_blocks(None, 12, 4, group, sharded=False).local_rows(slice(5, 8)) == slice(5, 8)
    assert make_blocks([0, 4, 7, 9], 12, 4, group, sharded=False).local_rows(slice(1, 3)).tolist() == [4, 7]
    assert make_blocks(None, 12, 4).local_rows(slice(5, 8)) == slice(5, 8)


# --- blocks that travel ---------------------------------------------------------------------------------------------

INDICES = [None, [0, 1, 2, 3, 5, 6, 8, 11], [0, 2, 9, 10, 11], [4, 7], []]


def batch() -> Tensor:
    """[12, 2], every number another one."""
    return torch.arange(24.0).view(12, 2)


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("block_tokens", [1, 3, 5, 100])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_rank_fetches_the_rows_that_count(index: list[int] | None, block_tokens: int, sharded: bool):
    group = Group(3)

    def fetch() -> list[tuple[slice, list[list[float]]]]:
        rank = group.rank()
        hidden = batch()[4 * rank : 4 * rank + 4] if sharded else batch()
        blocks = make_blocks(index, 12, block_tokens, group, sharded=sharded)
        return [(block, rows.tolist()) for block, rows in blocks.fetch(hidden)]

    wanted = batch() if index is None else batch()[index]
    expected = [
        (slice(start, min(start + block_tokens, len(wanted))), wanted[start : start + block_tokens].tolist())
        for start in range(0, len(wanted), block_tokens)
    ]
    assert group.run(fetch) == [expected] * 3


def test_the_next_block_is_under_way_and_no_more(monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []

    def recorded(tensor: Tensor, source: int, *, group: Group, async_op: bool) -> Work:
        events.append(f"start {len([event for event in events if event.startswith('start')])}")
        number = events[-1].removeprefix("start ")
        return Work(lambda: events.append(f"wait {number}"))

    monkeypatch.setattr(token_blocks.dist, "broadcast", recorded)
    # Rank 0 of two owns the first two blocks of two rows, rank 1 the others.
    for block, _ in make_blocks(None, 8, 2, Group(2).one(0)).fetch(torch.zeros(4, 1)):
        events.append(f"use {block.start // 2}")
    assert events == [
        *["start 0", "start 1", "wait 0", "use 0"],
        *["start 2", "wait 1", "use 1"],
        *["start 3", "wait 2", "use 2"],
        *["wait 3", "use 3"],
    ]


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("block_tokens", [1, 3, 5, 100])
@pytest.mark.parametrize("sharded", [False, True])
def test_gradients_are_summed_over_the_ranks_and_put_where_the_rows_are(
    index: list[int] | None, block_tokens: int, sharded: bool
):
    group = Group(3)

    def sum_blocks() -> list[list[float]]:
        rank = group.rank()
        blocks = make_blocks(index, 12, block_tokens, group, sharded=sharded)
        gradients = BlockGradients(blocks, torch.full((4 if sharded else 12, 2), -1.0, dtype=torch.float64))
        # Rank r adds 10^r times the row: each rank's part shows in the sum.
        mine = 10**rank * (batch() if index is None else batch()[index])
        for start in range(0, len(mine), block_tokens):
            block = slice(start, min(start + block_tokens, len(mine)))
            gradients.add(block, mine[block].clone())
        return gradients.finish().tolist()

    total = 111 * batch().double()
    counted = torch.zeros(12, 1, dtype=torch.bool)
    counted[slice(None) if index is None else index] = True
    expected = torch.where(counted, total, -1.0)
    parts = [expected[4 * rank : 4 * rank + 4] if sharded else expected for rank in range(3)]
    assert group.run(sum_blocks) == [part.tolist() for part in parts]


@pytest.mark.parametrize("group", [None, Group(1).one(0)])
def test_one_rank_sums_nothing(group: Group | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_blocks, "dist", None)  # no collective
    gradients = BlockGradients(make_blocks([0, 2], 3, 1, group), torch.zeros(3, 1, dtype=torch.bfloat16))
    gradients.add(slice(0, 1), torch.tensor([[1.5]]))
    gradients.add(slice(1, 2), torch.tensor([[2.5]]))
    result = gradients.finish()
    assert result.dtype == torch.bfloat16 and result.tolist() == [[1.5], [0.0], [2.5]]


def test_one_sum_is_under_way_while_the_next_block_is_computed(monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    monkeypatch.setattr(
        token_blocks.dist, "all_reduce", lambda rows, **_: Work(lambda: events.append(f"wait {rows.item():.0f}"))
    )
    gradients = BlockGradients(make_blocks(None, 3, 1, Group(2).one(0), sharded=False), torch.zeros(3, 1))
    for row in range(3):
        gradients.add(slice(row, row + 1), torch.full((1, 1), float(row)))
        events.append(f"added {row}")
    gradients.finish()
    assert events == ["added 0", "wait 0", "added 1", "wait 1", "added 2", "wait 2"]
    assert gradients.gradients.tolist() == [[0.0], [1.0], [2.0]]
