"""Packing: where each label, weight and boundary lands, and that ranks and micro-batches partition the step."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from chord_megatron.algorithm.aggregation import Aggregation, Mean
from chord_megatron.batching.packing import BatchLayout, build_global_batch, pack, unpack
from chord_megatron.types import GlobalBatch, TrainingSample


def sample(
    tokens: list[int], mask: list[int], *, is_expert: bool = False, advantage: float = 0.0, temperature: float = 1.0
) -> TrainingSample:
    return TrainingSample(
        tokens=torch.tensor(tokens),
        loss_mask=torch.tensor(mask, dtype=torch.bool),
        is_expert=is_expert,
        temperature=temperature,
        advantage=advantage,
    )


def step(num_samples: int = 7) -> list[TrainingSample]:
    """Sequences of 3 to 9 tokens with prompts of 1 to 3; every third is an expert answer. Tokens name their sample."""
    samples = []
    for i in range(num_samples):
        length, prompt = 3 + (5 * i) % 7, 1 + i % 3
        samples.append(
            sample(
                [100 * i + t for t in range(length)],
                [t >= prompt for t in range(length)],
                is_expert=i % 3 == 2,
                advantage=float(i),
            )
        )
    return samples


def all_ranks(samples: list[TrainingSample], layout: BatchLayout, **settings) -> list[GlobalBatch]:
    ranks = [dataclasses.replace(layout, dp_rank=rank) for rank in range(layout.dp_size)]
    return [build_global_batch(samples, rank, **settings) for rank in ranks]


# --- one micro-batch ------------------------------------------------------------------------------------------------


def test_every_field_by_hand():
    rollout = dataclasses.replace(
        sample([11, 12, 13, 14], [0, 0, 1, 1], advantage=1.5, temperature=0.5),
        tokens=torch.tensor([11, 12, 13, 14], dtype=torch.int32),
        rollout_log_probs=torch.tensor([0.0, 0.0, -0.25, -0.5]),
        old_log_probs=torch.tensor([0.0, 0.0, -1.0, -2.0]),
        ref_log_probs=torch.tensor([0.0, 0.0, -3.0, -4.0]),
    )
    expert = sample([21, 22, 23], [0, 1, 1], is_expert=True)
    batch = pack([expert, rollout], [1, 0], [0.125, 0.25], pad_to_multiple=5)
    # Sequence | sequence | padding; what concerns token t + 1 stands at t.
    assert batch.input_ids.tolist() == [11, 12, 13, 14, 21, 22, 23, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 0, 0]
    assert batch.labels.tolist() == [12, 13, 14, 0, 22, 23, 0, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 10] and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 4
    integers = (batch.input_ids, batch.position_ids, batch.labels)
    assert all(values.dtype == torch.int64 for values in integers)  # of int32 samples, too
    assert batch.rollout_weights.tolist() == [0, 0.25, 0.25, 0, 0, 0, 0, 0, 0, 0]
    assert batch.expert_weights.tolist() == [0, 0, 0, 0, 0.125, 0.125, 0, 0, 0, 0]
    assert batch.advantages.tolist() == [0, 1.5, 1.5, 0, 0, 0, 0, 0, 0, 0]
    assert batch.temperatures.tolist() == [0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1, 1]
    assert batch.rollout_log_probs.tolist() == [0, -0.25, -0.5, 0, 0, 0, 0, 0, 0, 0]
    assert batch.old_log_probs.tolist() == [0, -1, -2, 0, 0, 0, 0, 0, 0, 0]
    assert batch.ref_log_probs.tolist() == [0, -3, -4, 0, 0, 0, 0, 0, 0, 0]
    assert batch.num_tokens == 7 and batch.sample_indices == (1, 0)


def test_a_full_micro_batch_has_no_padding_sequence():
    batch = pack([sample([1, 2, 3, 4], [0, 1, 1, 1])], [0], [0.5], pad_to_multiple=4)
    assert batch.cu_seqlens.tolist() == [0, 4] and batch.input_ids.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("multiple", "length"), [(1, 1), (8, 8)])
def test_an_empty_micro_batch_is_all_padding(multiple: int, length: int):
    batch = pack([], [], [], pad_to_multiple=multiple)
    assert batch.cu_seqlens.tolist() == [0, length]
    for name in ("input_ids", "position_ids", "labels", "rollout_weights", "expert_weights", "advantages"):
        assert getattr(batch, name).tolist() == [0] * length, name
    assert batch.rollout_log_probs.tolist() == [0] * length
    assert batch.temperatures.tolist() == [1] * length  # logits are divided by it
    assert batch.old_log_probs is None and batch.ref_log_probs is None
    assert batch.num_tokens == 0 and batch.sample_indices == ()


def test_absent_log_probs_stay_absent():
    batch = pack(step(3), [0, 1, 2], [0.1] * 3, pad_to_multiple=1)
    assert batch.old_log_probs is None and batch.ref_log_probs is None


@pytest.mark.parametrize("name", ["rollout_log_probs", "old_log_probs", "ref_log_probs"])
def test_log_probs_of_some_rollouts_only_are_refused(name: str):
    rollouts = [sample([1, 2], [0, 1]), dataclasses.replace(sample([3, 4], [0, 1]), **{name: torch.zeros(2)})]
    with pytest.raises(AssertionError, match=r"^some rollouts have these log-probs and some do not$"):
        pack(rollouts, [0, 1], [0.5, 0.5], pad_to_multiple=1)


@pytest.mark.parametrize("pad_to_multiple", [1, 4, 7, 64])
def test_the_token_count_is_the_next_multiple(pad_to_multiple: int):
    samples = step()
    for batch in build_global_batch(
        samples, BatchLayout(pad_to_multiple=pad_to_multiple), micro_batch_size=2
    ).micro_batches:
        expected = sum(len(samples[i].tokens) for i in batch.sample_indices)
        assert batch.num_tokens == expected
        assert len(batch.input_ids) % pad_to_multiple == 0
        assert 0 <= len(batch.input_ids) - expected < pad_to_multiple
        assert batch.cu_seqlens[-1].item() == len(batch.input_ids)


def test_unpack_undoes_pack():
    samples = step(3)
    batch = pack(samples, [2, 0, 1], [1.0] * 3, pad_to_multiple=8)
    lengths = [len(original.tokens) for original in samples]
    tokens = unpack(batch, batch.labels, lengths)
    masks = unpack(batch, batch.rollout_weights + batch.expert_weights, lengths)
    assert set(tokens) == {0, 1, 2}
    for i, original in enumerate(samples):
        assert tokens[i].tolist() == [0, *original.tokens.tolist()[1:]]  # the first token is never predicted
        assert masks[i].tolist() == original.loss_mask.float().tolist()
    assert unpack(pack([], [], [], pad_to_multiple=4), torch.ones(4), []) == {}


def test_moving_to_a_device_keeps_every_field():
    batch = pack(step(3), [0, 1, 2], [0.1] * 3, pad_to_multiple=8)
    moved = batch.to(torch.device("cpu"))
    for name, value in vars(batch).items():
        same = torch.equal(getattr(moved, name), value) if isinstance(value, torch.Tensor) else False
        assert same or getattr(moved, name) == value, name


# --- a step ---------------------------------------------------------------------------------------------------------


def test_a_loss_mask_on_the_first_token_is_never_counted():
    samples = [sample([5, 6, 7], [1, 1, 1]), sample([8, 9], [1, 1], is_expert=True), sample([4], [1])]
    step_batch = build_global_batch(samples, BatchLayout(), micro_batch_size=3)
    assert (step_batch.num_rollout_tokens, step_batch.num_expert_tokens, step_batch.num_tokens) == (2, 1, 6)
    (batch,) = step_batch.micro_batches
    assert batch.rollout_weights.tolist() == [0.5, 0.5, 0, 0, 0, 0]
    assert batch.expert_weights.tolist() == [0, 0, 0, 1, 0, 0]
    assert batch.rollout_mask.tolist() == [1, 1, 0, 0, 0, 0] and batch.expert_mask.tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("aggregation", "first", "second"),
    [("token_mean", 1 / 8, 1 / 8), ("sequence_mean", 1 / 4, 1 / 12), ("fixed_length", 1 / 32, 1 / 32)],
)
def test_the_rollout_mean_does_not_touch_the_expert_mean(aggregation: Aggregation, first: float, second: float):
    samples = [
        sample([0] * 3, [0, 1, 1]),
        sample([0] * 5, [0, 1, 1, 1, 1], is_expert=True),
        sample([0] * 7, [0, 1, 1, 1, 1, 1, 1]),
        sample([0] * 4, [0, 0, 0, 0]),  # filtered: no token, no sequence
    ]
    whole = build_global_batch(samples, BatchLayout(), micro_batch_size=4, rollout_mean=Mean(aggregation, 16))
    (batch,) = whole.micro_batches
    weights = unpack(batch, batch.rollout_weights, whole.lengths)
    as_float32 = torch.tensor([first, second])
    assert weights[0].tolist() == [0, *[as_float32[0].item()] * 2]
    assert weights[2].tolist() == [0, *[as_float32[1].item()] * 6]
    assert not weights[3].any() and not weights[1].any()
    assert unpack(batch, batch.expert_weights, whole.lengths)[1].tolist() == [0, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("shuffle_seed", [None, 11])
@pytest.mark.parametrize("micro_batch_multiple", [1, 3])
def test_ranks_partition_the_step(dp_size, micro_batch_size, shuffle_seed, micro_batch_multiple):
    samples = step()
    ranks = all_ranks(
        samples,
        BatchLayout(dp_size=dp_size, micro_batch_multiple=micro_batch_multiple, pad_to_multiple=4),
        micro_batch_size=micro_batch_size,
        shuffle_seed=shuffle_seed,
    )
    batches = [batch for rank in ranks for batch in rank.micro_batches]
    assert Counter(i for batch in batches for i in batch.sample_indices) == Counter(range(len(samples)))
    assert max(len(batch.sample_indices) for batch in batches) <= micro_batch_size

    largest_share = -(-len(samples) // dp_size)
    needed = -(-largest_share // micro_batch_size)
    expected = -(-needed // micro_batch_multiple) * micro_batch_multiple
    assert [len(rank.micro_batches) for rank in ranks] == [expected] * dp_size

    for batch in batches:  # the packed rows are the named samples
        for i, labels in unpack(batch, batch.labels, ranks[0].lengths).items():
            assert labels[1:].tolist() == samples[i].tokens[1:].tolist()


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_counts_are_global_and_equal_on_every_rank(dp_size: int):
    samples = step()
    rollout = sum(int(s.loss_mask[1:].sum()) for s in samples if not s.is_expert)
    expert = sum(int(s.loss_mask[1:].sum()) for s in samples if s.is_expert)
    tokens = sum(len(s.tokens) for s in samples)
    for rank in all_ranks(samples, BatchLayout(dp_size=dp_size, pad_to_multiple=16), micro_batch_size=2):
        assert (rank.num_rollout_tokens, rank.num_expert_tokens, rank.num_tokens) == (rollout, expert, tokens)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("mean", [Mean("token_mean"), Mean("sequence_mean"), Mean(rows=2), Mean(rows=3, by_rows=True)])
def test_each_stream_sums_to_a_mean(dp_size: int, mean: Mean):
    """The weights of all ranks and micro-batches sum to 1, within one part in 2^24: the rounding of a float32."""
    ranks = all_ranks(
        step(), BatchLayout(dp_size=dp_size, micro_batch_multiple=2), micro_batch_size=2, rollout_mean=mean
    )
    for name in ("rollout_weights", "expert_weights"):
        total = sum(getattr(b, name).double().sum().item() for rank in ranks for b in rank.micro_batches)
        assert abs(total - 1) <= 2**-24, name


def test_weights_that_float32_holds_sum_to_one_exactly():
    samples = [sample([0] * n, [0] + [1] * (n - 1)) for n in (2, 4, 5, 9)]  # 1 + 3 + 4 + 8 = 16 tokens
    ranks = all_ranks(samples, BatchLayout(dp_size=3), micro_batch_size=1)
    assert sum(b.rollout_weights.sum().item() for rank in ranks for b in rank.micro_batches) == 1.0


def test_the_share_of_a_rank_by_hand():
    samples = step(5)
    first, second = all_ranks(samples, BatchLayout(dp_size=2), micro_batch_size=2)
    assert [batch.sample_indices for batch in first.micro_batches] == [(0, 2), (4,)]
    assert [batch.sample_indices for batch in second.micro_batches] == [(1, 3), ()]  # filled up, so that it runs


def test_the_shuffle_depends_on_its_seed_only():
    samples = step()
    orders = []
    for seed in (1, 1, 2, None):
        torch.manual_seed(len(orders))
        batch = build_global_batch(samples, BatchLayout(), micro_batch_size=7, shuffle_seed=seed)
        orders.append(batch.micro_batches[0].sample_indices)
    assert orders[0] == orders[1] != orders[2]
    assert orders[3] == tuple(range(7))


def test_a_step_without_samples_still_runs_one_micro_batch():
    batch = build_global_batch([], BatchLayout(pad_to_multiple=4), micro_batch_size=2)
    assert (batch.num_rollout_tokens, batch.num_expert_tokens, batch.num_tokens) == (0, 0, 0)
    assert [micro.input_ids.tolist() for micro in batch.micro_batches] == [[0, 0, 0, 0]]
