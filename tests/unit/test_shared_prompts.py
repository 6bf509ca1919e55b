"""A prompt read once: which tokens the model reads, which predicts which row, and attention to a prompt elsewhere."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from chord_megatron.backend.attention import packed_attention
from chord_megatron.batching.packing import pack
from chord_megatron.batching.shared_prompts import prompt_groups, share_prompts
from chord_megatron.types import Segment, TrainingSample


def row(tokens: list[int], prompt: int) -> TrainingSample:
    return TrainingSample(torch.tensor(tokens), torch.arange(len(tokens)) >= prompt, is_expert=False, temperature=1.0)


SAMPLES = [
    row([1, 2, 3, 10, 11], 3),
    row([7, 8, 20], 2),  # a prompt of its own
    row([1, 2, 3, 12], 3),
    row([1, 2, 3], 3),  # without a completion
    dataclasses.replace(row([1, 2, 3, 13, 14], 3), is_expert=True),  # experts answer the same prompt
]


def test_groups_by_hand():
    assert prompt_groups(SAMPLES, [4, 1, 0, 2, 3]) == [(3, [4, 0, 2, 3]), (0, [1])]
    assert prompt_groups(SAMPLES, [0, 1]) == [(0, [0]), (0, [1])]


def test_a_micro_batch_by_hand():
    apart = pack(SAMPLES, [0, 1, 2, 3, 4], [1.0] * 5, pad_to_multiple=4)
    batch = share_prompts(apart, SAMPLES, pad_to_multiple=4)
    assert batch.segments == (
        Segment(0, 3),
        Segment(3, 2, 0, 3),
        Segment(5, 1, 0, 3),
        Segment(6, 2, 0, 3),
        Segment(8, 3),
        Segment(11, 1),
    )
    assert batch.input_ids.tolist() == [1, 2, 3, 10, 11, 12, 13, 14, 7, 8, 20, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 0, 1, 2, 0]
    assert batch.token_of.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 0, 1, 2, 5, 0, 1, 2, 0, 1, 2, 6, 7]
    # What the loss reads is the same.
    for name in ("labels", "rollout_mask", "expert_mask", "rollout_weights", "cu_seqlens", "temperatures"):
        assert torch.equal(getattr(batch, name), getattr(apart, name)), name
    # Each row's label follows the token that predicts it, or another completion of its prompt does.
    for place, token in enumerate(batch.token_of.tolist()):
        if apart.counts[place]:
            assert batch.input_ids[token] == apart.input_ids[place]
            assert batch.position_ids[token] == apart.position_ids[place]


def test_rows_without_company_stay_as_they_are():
    apart = pack(SAMPLES, [0, 1], [1.0] * 5, pad_to_multiple=1)
    assert share_prompts(apart, SAMPLES, 1) is apart


@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
def test_attention_is_that_of_whole_sequences(heads: tuple[int, int]):
    """Values and gradients in float64, of each completion behind its own copy of the prompt."""
    generator = torch.Generator().manual_seed(0)
    segments = [Segment(0, 5), Segment(5, 3, 0, 5), Segment(8, 2, 0, 5), Segment(10, 3, 0, 5), Segment(13, 4)]

    def numbers(count: int, size: int) -> Tensor:
        return torch.randn(17, count, size, dtype=torch.float64, generator=generator).requires_grad_()

    query, key, value = numbers(heads[0], 8), numbers(heads[1], 8), numbers(heads[1], 6)
    found = packed_attention(query, key, value, segments)
    expected = torch.empty_like(found)
    groups = heads[0] // heads[1]
    for start, length, prompt_start, prompt_length in segments:
        own = list(range(start, start + length))
        seen = [*range(prompt_start, prompt_start + prompt_length), *own]
        for head in range(heads[0]):
            scores = query[own, head] @ key[seen, head // groups].T / 8**0.5
            hidden = torch.ones(length, len(seen), dtype=torch.bool).triu(prompt_length + 1)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            expected[own, 6 * head : 6 * head + 6] = weights @ value[seen, head // groups]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    upstream = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    inputs = (query, key, value)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
