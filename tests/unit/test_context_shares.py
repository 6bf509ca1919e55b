"""A context-parallel rank's share of a micro-batch: which tokens, with what, and that none is lost or counted twice."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chord_megatron.batching.context_parallel import share_of_rank
from chord_megatron.batching.packing import BatchLayout, build_global_batch, pack, unpack
from chord_megatron.types import MicroBatch, TrainingSample


def rollout(tokens: list[int], prompt_length: int) -> TrainingSample:
    counting = torch.arange(len(tokens)) / 8
    return TrainingSample(
        tokens=torch.tensor(tokens),
        loss_mask=torch.arange(len(tokens)) >= prompt_length,
        is_expert=False,
        temperature=0.5,
        advantage=1.5,
        rollout_log_probs=-counting,
        old_log_probs=-2 * counting,
        ref_log_probs=-4 * counting,
    )


def expert(tokens: list[int]) -> TrainingSample:
    mask = torch.arange(len(tokens)) > 0
    return TrainingSample(torch.tensor(tokens), mask, is_expert=True, temperature=1.0)


def shares(batch: MicroBatch, size: int, pad_to_multiple: int = 1) -> list[MicroBatch]:
    return [share_of_rank(batch, rank, size, pad_to_multiple) for rank in range(size)]


def test_every_field_by_hand():
    """Five tokens are filled up to four chunks of two, one to four chunks of one; the pack's own padding goes."""
    batch = pack([rollout([11, 12, 13, 14, 15], 2), expert([21])], [0, 1], [0.25, 0.5], pad_to_multiple=8)
    first, second = shares(batch, 2)
    # Chunks 0 and 3 of either sequence, then chunks 1 and 2.
    assert first.input_ids.tolist() == [11, 12, 0, 0, 21, 0] and second.input_ids.tolist() == [13, 14, 15, 0, 0, 0]
    assert first.position_ids.tolist() == [0, 1, 6, 7, 0, 3] and second.position_ids.tolist() == [2, 3, 4, 5, 1, 2]
    assert first.labels.tolist() == [12, 13, 0, 0, 0, 0] and second.labels.tolist() == [14, 15, 0, 0, 0, 0]
    assert first.rollout_mask.tolist() == [0, 1, 0, 0, 0, 0] and second.rollout_mask.tolist() == [1, 1, 0, 0, 0, 0]
    assert first.rollout_weights.tolist() == [0, 0.25, 0, 0, 0, 0]
    assert second.advantages.tolist() == [1.5, 1.5, 0, 0, 0, 0]
    assert second.rollout_log_probs.tolist() == [-0.375, -0.5, 0, 0, 0, 0]
    assert second.old_log_probs.tolist() == [-0.75, -1, 0, 0, 0, 0]
    assert second.ref_log_probs.tolist() == [-1.5, -2, 0, 0, 0, 0]
    assert first.temperatures.tolist() == [0.5, 0.5, 1, 1, 1, 1]
    assert second.temperatures.tolist() == [0.5, 0.5, 0.5, 1, 1, 1]
    assert (first.num_tokens, second.num_tokens) == (3, 3)
    for share in (first, second):
        assert share.cu_seqlens.tolist() == [0, 4, 6] and share.cu_seqlens.dtype == torch.int32
        assert share.max_seqlen == 4 and share.sample_indices == (0, 1)
        assert not share.expert_mask.any()  # an answer of one token has none that is predicted


@pytest.mark.parametrize(("pad_to_multiple", "tokens"), [(1, 6), (2, 6), (3, 6), (4, 8), (5, 10), (7, 14)])
def test_a_share_is_padded_by_a_sequence_of_its_own(pad_to_multiple: int, tokens: int):
    batch = pack([expert([1, 2, 3, 4, 5]), expert([6, 7])], [0, 1], [1.0, 1.0], pad_to_multiple=pad_to_multiple)
    for share in shares(batch, 2, pad_to_multiple):
        assert len(share.input_ids) == tokens
        assert share.cu_seqlens.tolist() == [0, 4, 6] + [tokens] * (tokens > 6)
        assert share.max_seqlen == max(4, tokens - 6)


def test_a_micro_batch_without_samples_has_a_share_of_padding():
    for share in shares(pack([], [], [], pad_to_multiple=1), 3, pad_to_multiple=2):
        assert share.input_ids.tolist() == [0, 0] and share.temperatures.tolist() == [1, 1]
        assert share.cu_seqlens.tolist() == [0, 2] and share.num_tokens == 0 and share.max_seqlen == 2


def test_without_other_ranks_a_share_is_the_micro_batch():
    """But for the padding to two chunks."""
    batch = pack([rollout([1, 2, 3, 4], 1), rollout([5, 6], 1)], [1, 0], [0.5, 0.25], pad_to_multiple=1)
    (share,) = shares(batch, 1)
    for field in dataclasses.fields(MicroBatch):
        before, after = getattr(batch, field.name), getattr(share, field.name)
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after, field.name


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=6),
    size=st.integers(2, 5),
    pad_to_multiple=st.integers(1, 6),
    micro_batch_size=st.integers(1, 4),
)
def test_the_ranks_have_every_token_once(lengths: list[int], size: int, pad_to_multiple: int, micro_batch_size: int):
    samples = [
        rollout([100 * i + t for t in range(n)], 1) if i % 2 else expert([100 * i + t for t in range(n)])
        for i, n in enumerate(lengths)
    ]
    layout = BatchLayout(pad_to_multiple=pad_to_multiple)
    whole = build_global_batch(samples, layout, micro_batch_size=micro_batch_size)
    ranks = [
        build_global_batch(
            samples, dataclasses.replace(layout, cp_rank=rank, cp_size=size), micro_batch_size=micro_batch_size
        )
        for rank in range(size)
    ]
    for rank in ranks:
        assert rank.lengths == whole.lengths and rank.num_tokens == whole.num_tokens
    for batch, *parts in zip(whole.micro_batches, *(rank.micro_batches for rank in ranks), strict=True):
        assert sum(part.num_tokens for part in parts) == batch.num_tokens
        assert len({tuple(part.cu_seqlens.tolist()) for part in parts}) == 1  # as many tokens on each
        for name in ("labels", "rollout_weights", "expert_weights", "advantages", "rollout_log_probs", "counts"):
            wanted = unpack(batch, getattr(batch, name).double(), whole.lengths)
            found = [unpack(part, getattr(part, name).double(), whole.lengths) for part in parts]
            for index, row in wanted.items():
                assert torch.equal(sum(of_rank[index] for of_rank in found), row), name
        for part in parts:
            bounds = part.cu_seqlens
            assert len(part.input_ids) == bounds[-1] and len(part.input_ids) % math.lcm(2, pad_to_multiple) == 0
            assert part.max_seqlen == bounds.diff().max()
            assert (part.labels[part.counts] == part.input_ids[part.counts] + 1).all()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_causal_attention_costs_every_rank_the_same(size: int):
    """Pairs of a query and a key before or at it, over a sequence that needs no padding."""
    batch = pack([expert([*range(8 * size)])], [0], [1.0], pad_to_multiple=1)
    costs = {int((share.position_ids + 1).sum()) for share in shares(batch, size)}
    assert costs == {8 * size * (8 * size + 1) // 2 // size}
