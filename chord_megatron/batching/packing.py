"""Packing: the samples of a step become the micro-batches of each data-parallel rank. Pure functions.

Rollout and expert samples share micro-batches of [tokens] with `cu_seqlens`. Which rank and micro-batch a
sample lands in changes nothing but rounding: its loss weight already carries the global denominator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from chord_megatron.algorithm.aggregation import Mean, aggregation_weights
from chord_megatron.batching.assignment import Cost, by_cost, by_count, imbalance, round_up
from chord_megatron.batching.context_parallel import share_of_rank
from chord_megatron.batching.routing import pack_routing
from chord_megatron.batching.shared_prompts import share_prompts
from chord_megatron.types import GlobalBatch, MicroBatch, TrainingSample

TOKEN_MEAN = Mean()


@dataclass(frozen=True)
class BatchLayout:
    """What the parallel layout and the model ask of a batch."""

    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    pad_to_multiple: int = 1  # of each micro-batch's token count (TP under sequence parallelism)
    # Of the number of micro-batches (interleaved pipelines). Every rank gets as many, filled up with empty ones.
    micro_batch_multiple: int = 1
    attention_length: float = math.inf  # at which attention costs as much as all the rest of a layer
    can_share_prompts: bool = True  # whether the attention takes a prompt that stands elsewhere


def build_global_batch(
    samples: Sequence[TrainingSample],
    layout: BatchLayout,
    *,
    micro_batch_size: int,
    max_tokens: int | None = None,
    shuffle_seed: int | None = None,
    shares_prompts: bool = False,
    skips_idle_rows: bool = False,
    rollout_mean: Mean = TOKEN_MEAN,
    expert_mean: Mean = TOKEN_MEAN,
) -> GlobalBatch:
    """A rank's micro-batches of a step.

    samples: all samples of the step, the same on every rank. micro_batch_size: sequences per micro-batch, in their
    order; shuffle_seed: None keeps it. max_tokens: of a micro-batch, with rows spread by what they cost, in place of
    both. shares_prompts: see share_prompts, where the attention can. skips_idle_rows: rows whose loss has no gradient
    are not run; the denominators stay those of all rows.
    """
    weights, num_tokens = _weights(samples, rollout_mean, expert_mean)
    order = list(range(len(samples)))
    if shuffle_seed is not None:
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(shuffle_seed)).tolist()
    if skips_idle_rows:
        order = [i for i in order if not _is_idle(samples[i], weights[i])]
    shares_prompts = shares_prompts and layout.can_share_prompts
    cost = Cost(layout.attention_length, shares_prompts)
    if max_tokens is None:
        ranks = by_count(order, layout.dp_size, micro_batch_size, layout.micro_batch_multiple)
    else:
        ranks = by_cost(samples, order, layout.dp_size, max_tokens, layout.micro_batch_multiple, cost)
    micro_batches = [pack(samples, rows, weights, layout.pad_to_multiple) for rows in ranks[layout.dp_rank]]
    if layout.cp_size > 1:
        share = partial(share_of_rank, rank=layout.cp_rank, size=layout.cp_size, pad_to_multiple=layout.pad_to_multiple)
        micro_batches = [*map(share, micro_batches)]
    if shares_prompts:
        micro_batches = [share_prompts(batch, samples, layout.pad_to_multiple) for batch in micro_batches]
    return GlobalBatch(
        micro_batches=tuple(micro_batches),
        num_rollout_tokens=num_tokens[False],
        num_expert_tokens=num_tokens[True],
        num_run_rollout_tokens=sum(samples[i].num_loss_tokens for i in order if not samples[i].is_expert),
        num_tokens=sum(len(samples[i].tokens) for i in order),
        lengths=tuple(len(sample.tokens) for sample in samples),
        num_idle_rows=len(samples) - len(order),
        imbalance=imbalance(samples, ranks, cost),
    )


def _weights(
    samples: Sequence[TrainingSample], rollout_mean: Mean, expert_mean: Mean
) -> tuple[list[float], dict[bool, int]]:
    """What a loss token of each sample counts, and the loss tokens of the rollouts (False) and experts (True)."""
    weights, num_tokens = [0.0] * len(samples), {}
    for is_expert, mean in ((False, rollout_mean), (True, expert_mean)):
        rows = [i for i, sample in enumerate(samples) if sample.is_expert == is_expert]
        lengths = [samples[i].num_loss_tokens for i in rows]
        num_tokens[is_expert] = sum(lengths)
        for i, weight in zip(rows, aggregation_weights(lengths, mean)):
            weights[i] = weight
    return weights, num_tokens


def _is_idle(sample: TrainingSample, weight: float) -> bool:
    """Whether every token has the weight 0, or, of a rollout, the advantage 0."""
    advantage = 1.0 if sample.is_expert else sample.advantage
    teaches = sample.loss_mask * weight * sample.token_weights * advantage
    return not teaches[1:].any()


def pack(
    samples: Sequence[TrainingSample],
    indices: Sequence[int],
    token_weights: Sequence[float],
    pad_to_multiple: int,
) -> MicroBatch:
    """One micro-batch of the named samples; `token_weights[i]` is what a loss token of sample i counts."""
    chosen = [samples[i] for i in indices]
    weights = [token_weights[i] for i in indices]
    lengths = [len(sample.tokens) for sample in chosen]
    num_tokens = sum(lengths)
    # A micro-batch is never empty, so that every rank runs the model in every slot of the schedule.
    padding = round_up(max(num_tokens, 1), pad_to_multiple) - num_tokens
    boundaries = [0, *lengths, *([padding] if padding else [])]

    def packed(dtype: torch.dtype, rows: list[Tensor]) -> Tensor:
        return torch.cat([*[row.to(dtype) for row in rows], torch.zeros(padding, dtype=dtype)])

    def weighted(masks: list[Tensor]) -> Tensor:
        rows = [m * weight * _per_token(s.token_weights) for m, weight, s in zip(masks, weights, chosen)]
        return packed(torch.float32, rows)

    def optional(rows: list[Tensor | None]) -> Tensor | None:
        of_rollouts = {row is None for row, sample in zip(rows, chosen) if not sample.is_expert}
        assert len(of_rollouts) < 2, "some rollouts have these log-probs and some do not"
        if of_rollouts != {False}:
            return None
        return packed(
            torch.float32,
            [_shift(torch.zeros(n) if row is None else row) for row, n in zip(rows, lengths)],
        )

    rollout_masks = [_shift(sample.loss_mask & (not sample.is_expert)) for sample in chosen]
    expert_masks = [_shift(sample.loss_mask & sample.is_expert) for sample in chosen]
    rollout_log_probs = optional([sample.rollout_log_probs for sample in chosen])
    temperatures = [torch.full((n,), sample.temperature) for sample, n in zip(chosen, lengths)]
    return MicroBatch(
        input_ids=packed(torch.int64, [sample.tokens for sample in chosen]),
        position_ids=packed(torch.int64, [torch.arange(n) for n in lengths]),
        is_token=torch.arange(num_tokens + padding) < num_tokens,
        labels=packed(torch.int64, [_shift(sample.tokens) for sample in chosen]),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32).cumsum(0, dtype=torch.int32),
        rollout_mask=packed(torch.bool, rollout_masks),
        expert_mask=packed(torch.bool, expert_masks),
        rollout_weights=weighted(rollout_masks),
        expert_weights=weighted(expert_masks),
        advantages=packed(torch.float32, [m * _per_token(s.advantage) for m, s in zip(rollout_masks, chosen)]),
        # Padding divides by 1, not by 0.
        temperatures=torch.cat([*temperatures, torch.ones(padding)]),
        rollout_log_probs=torch.zeros(num_tokens + padding) if rollout_log_probs is None else rollout_log_probs,
        old_log_probs=optional([sample.old_log_probs for sample in chosen]),
        ref_log_probs=optional([sample.ref_log_probs for sample in chosen]),
        num_tokens=num_tokens,
        max_seqlen=max(boundaries),
        sample_indices=tuple(indices),
        routing=pack_routing([sample.routing for sample in chosen], [*lengths, padding]),
    )


def unpack(batch: MicroBatch, values: Tensor, lengths: Sequence[int]) -> dict[int, Tensor]:
    """Undo `pack` for per-position values [tokens]: sample index -> [length], 0 at the first token.

    lengths: of all samples. 0 also where other context-parallel ranks have the value.
    """
    bounds = batch.cu_seqlens.tolist()
    rows = {}
    for slot, index in enumerate(batch.sample_indices):
        own, length = slice(bounds[slot], bounds[slot + 1]), lengths[index]
        row = values.new_zeros(length + 1)  # one place more, for what nothing follows
        row[(batch.positions[own] + 1).clamp(max=length)] = values[own]
        rows[index] = row[:length]
    return rows


def _per_token(value: float | Tensor) -> float | Tensor:
    """The number of a whole sample, or those of its tokens where they are predicted."""
    return _shift(value) if isinstance(value, Tensor) else value


def _shift(values: Tensor) -> Tensor:
    """Move what concerns token t + 1 to position t; nothing follows the last token."""
    return torch.cat([values[1:], values.new_zeros(1)])
