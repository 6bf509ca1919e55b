"""Which data-parallel rank and micro-batch each row of a step goes to. Pure, and the same on every rank.

Where a row lands changes nothing but rounding and time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from chord_megatron.batching.shared_prompts import prompt_groups
from chord_megatron.types import TrainingSample

Rows = list[int]  # numbers of samples, in packing order


@dataclass(frozen=True)
class Cost:
    """What the model does for rows, in tokens.

    l tokens behind a prompt of p cost l + l (l + 2 p) / attention_length, which is where attention costs as much as
    all the rest of a layer. shares_prompts: rows of one prompt that are together pay for it once.
    """

    attention_length: float = math.inf
    shares_prompts: bool = False

    def of(self, samples: Sequence[TrainingSample], rows: Sequence[int]) -> tuple[int, float]:
        """(tokens, cost) of a micro-batch."""
        total, cost = 0, 0.0
        for prompt, group in self.groups(samples, rows):
            for tokens, before in [(prompt, 0), *((len(samples[i].tokens) - prompt, prompt) for i in group)]:
                total, cost = total + tokens, cost + tokens + tokens * (tokens + 2 * before) / self.attention_length
        return total, cost

    def groups(self, samples: Sequence[TrainingSample], rows: Sequence[int]) -> list[tuple[int, Rows]]:
        """(tokens that they begin with, rows): what is better kept together."""
        return prompt_groups(samples, rows) if self.shares_prompts else [(0, [row]) for row in rows]


@dataclass
class _Bin:
    """Rows that are together: a prompt's, a micro-batch's."""

    rows: Rows = field(default_factory=list)
    tokens: int = 0
    cost: float = 0.0

    def add(self, other: _Bin) -> None:
        self.rows, self.tokens, self.cost = self.rows + other.rows, self.tokens + other.tokens, self.cost + other.cost


def by_count(order: Sequence[int], num_ranks: int, size: int, multiple: int) -> list[list[Rows]]:
    """[ranks][micro-batches] of up to `size` rows, dealt out in turn.

    Every rank has the same number of micro-batches, a multiple of `multiple`; the last ones may be empty.
    """
    count = round_up(max(1, -(-len(order) // (num_ranks * size))), multiple)
    shares = [list(order[rank::num_ranks]) for rank in range(num_ranks)]
    return [[share[start : start + size] for start in range(0, count * size, size)] for share in shares]


def by_cost(
    samples: Sequence[TrainingSample], order: Sequence[int], num_ranks: int, max_tokens: int, multiple: int, cost: Cost
) -> list[list[Rows]]:
    """[ranks][micro-batches] of at most `max_tokens` tokens, alike in cost, each rank's dearest first.

    Every rank has the same number of micro-batches, a multiple of `multiple`, and as few as hold the rows: the dearest
    first, each goes to the cheapest micro-batch with room for it, and so do micro-batches to ranks (longest processing
    time first: Graham, 1969). No row may be longer than max_tokens.
    """
    assert all(len(samples[row].tokens) <= max_tokens for row in order), "a row is longer than the budget"
    groups = cost.groups(samples, order)
    total = sum(prompt + sum(len(samples[i].tokens) - prompt for i in rows) for prompt, rows in groups)
    count = round_up(max(1, -(-total // (max_tokens * num_ranks))), multiple)
    while True:
        limit = min(max_tokens, total / (count * num_ranks))
        bins = [_Bin(part, *cost.of(samples, part)) for part in _parts(samples, groups, limit)]
        micro_batches = _spread(bins, count * num_ranks, max_tokens)
        if micro_batches is not None:
            break
        count += multiple
    ranks: list[list[_Bin]] = [[] for _ in range(num_ranks)]
    for micro_batch in sorted(micro_batches, key=_dearest_first):
        with_room = (rank for rank in ranks if len(rank) < count)
        min(with_room, key=lambda rank: sum(held.cost for held in rank)).append(micro_batch)
    return [[micro_batch.rows for micro_batch in rank] for rank in ranks]


def imbalance(samples: Sequence[TrainingSample], ranks: Sequence[Sequence[Rows]], cost: Cost) -> float:
    """The largest cost of a rank over their mean; 1 where there is nothing to do."""
    costs = [sum(cost.of(samples, rows)[1] for rows in micro_batches) for micro_batches in ranks]
    return max(costs) * len(costs) / sum(costs) if any(costs) else 1.0


def round_up(number: int, multiple: int) -> int:
    """The multiple at or above."""
    return -(-number // multiple) * multiple


def _parts(samples: Sequence[TrainingSample], groups: Sequence[tuple[int, Rows]], limit: float) -> Iterator[Rows]:
    """The groups, in parts of at most `limit` tokens or of one row."""
    for prompt, rows in groups:
        part, tokens = [rows[0]], len(samples[rows[0]].tokens)
        for row in rows[1:]:
            length = len(samples[row].tokens) - prompt
            if tokens + length > limit:
                yield part
                part, tokens = [], prompt
            part, tokens = [*part, row], tokens + length
        yield part


def _spread(bins: Sequence[_Bin], count: int, max_tokens: int) -> list[_Bin] | None:
    """Into `count` of them; None where they do not fit."""
    filled = [_Bin() for _ in range(count)]
    for rows in sorted(bins, key=_dearest_first):
        with_room = [held for held in filled if held.tokens + rows.tokens <= max_tokens]
        if not with_room:
            return None
        min(with_room, key=lambda held: held.cost).add(rows)
    return filled


def _dearest_first(held: _Bin) -> float:
    return -held.cost
