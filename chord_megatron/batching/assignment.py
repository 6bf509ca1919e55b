"""Which data-parallel rank and micro-batch each row of a step goes to. Pure, and the same on every rank.

Where a row lands changes nothing but rounding and time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class _Part(NamedTuple):
    """Rows that stay together."""

    rows: Rows
    tokens: int
    cost: float


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
    """[ranks][micro-batches] of at most `max_tokens` tokens: ranks alike in cost, and micro-batches of a rank.

    Every rank has the same number of micro-batches, a multiple of `multiple` and as few as will do; the dearest of a
    rank come first. The dearest rows are given away first, to whom has least (longest processing time first: Graham,
    1969): to ranks, and then to micro-batches with room. No row may be longer than max_tokens.
    """
    assert all(len(samples[row].tokens) <= max_tokens for row in order), "a row is longer than the budget"
    groups = cost.groups(samples, order)
    total = sum(prompt + sum(len(samples[i].tokens) - prompt for i in rows) for prompt, rows in groups)
    # Cutting the rows of a prompt makes ranks more alike, and each part reads the prompt: what is dearest decides.
    fair_share = total / num_ranks + max((prompt for prompt, _ in groups), default=0)
    limits = [max_tokens, *(fair_share / parts for parts in (1, 2, 4) if cost.shares_prompts)]
    ranks = min((_ranks(samples, groups, num_ranks, min(limit, max_tokens), cost) for limit in limits), key=_dearest)
    count = multiple
    while not all(filled := [_spread(rank, count, max_tokens) for rank in ranks]):
        count += multiple
    return [_dearest_first(rank) for rank in filled]


def _ranks(
    samples: Sequence[TrainingSample], groups: Sequence[tuple[int, Rows]], num_ranks: int, limit: float, cost: Cost
) -> list[list[_Part]]:
    """What each rank gets, with rows of a prompt together up to `limit` tokens."""
    parts = [_Part(part, *cost.of(samples, part)) for part in _parts(samples, groups, limit)]
    return _spread(parts, num_ranks, math.inf)


def _dearest(ranks: Sequence[Sequence[_Part]]) -> float:
    return max(sum(part.cost for part in parts) for parts in ranks)


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


def _spread(parts: Sequence[_Part], count: int, max_tokens: float) -> list[list[_Part]]:
    """Into `count` of at most so many tokens; [] where they do not fit."""
    filled: list[list[_Part]] = [[] for _ in range(count)]
    tokens, costs = [0] * count, [0.0] * count
    for part in sorted(parts, key=lambda part: -part.cost):
        with_room = [i for i in range(count) if tokens[i] + part.tokens <= max_tokens]
        if not with_room:
            return []
        place = min(with_room, key=costs.__getitem__)
        filled[place].append(part)
        tokens[place], costs[place] = tokens[place] + part.tokens, costs[place] + part.cost
    return filled


def _dearest_first(micro_batches: Sequence[Sequence[_Part]]) -> list[Rows]:
    ordered = sorted(micro_batches, key=lambda parts: -sum(part.cost for part in parts))
    return [[row for part in parts for row in part.rows] for parts in ordered]
