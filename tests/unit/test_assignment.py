"""Rows to ranks and micro-batches: within the budget, as even as can be, the same whoever asks; idle rows stay out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.algorithm.policy_losses import LOSS_TYPES, RATIO_LEVELS
from chord_megatron.batching.assignment import Cost, by_cost, by_count, imbalance
from chord_megatron.batching.packing import BatchLayout, build_global_batch
from chord_megatron.config import ChordConfig, GRPOConfig
from chord_megatron.planning.pipeline import attention_length, part_costs
from chord_megatron.system.errors import UserError
from chord_megatron.training.objective import build_objective
from chord_megatron.training.packing import expert_name, refuse_longer_rows
from chord_megatron.types import TrainingSample
from chord_megatron.weights.architecture import ModelArchitecture


def row(length: int, *, prompt: int = 0, advantage: float | torch.Tensor = 1.0, **changes: Any) -> TrainingSample:
    """`length` tokens, of which those behind the prompt are learnt; prompts of one length are one prompt."""
    return TrainingSample(
        **{
            "tokens": torch.cat([torch.arange(prompt), torch.full((length - prompt,), 99)]),
            "loss_mask": torch.arange(length) >= prompt,
            "is_expert": False,
            "temperature": 1.0,
            "advantage": advantage,
            **changes,
        }
    )


def spread(samples: list[TrainingSample], ranks: int, budget: int, multiple: int = 1, **cost: Any) -> list:
    return by_cost(samples, range(len(samples)), ranks, budget, multiple, Cost(**cost))


# --- a budget of tokens ----------------------------------------------------------------------------------------------


def test_a_step_by_hand():
    """6 | 4, then 4 to the second, 3 to the first, 2 to the second, 1 to the first, where equal."""
    samples = [row(length) for length in (3, 6, 1, 4, 4, 2)]
    assert spread(samples, ranks=2, budget=10) == [[[1, 0, 2]], [[3, 4, 5]]]
    assert imbalance(samples, spread(samples, ranks=2, budget=10), Cost()) == 1.0
    assert spread(samples, ranks=2, budget=7) == [[[1], [0, 2]], [[3, 5], [4]]]
    assert spread(samples, ranks=1, budget=7, multiple=2) == [[[1], [3, 2], [0, 5], [4]]]


def test_attention_makes_long_rows_dearer():
    """At an attention length of 4 a row of 8 costs 8 + 8 x 8 / 4 = 24, as much as three of 4."""
    samples = [row(8), row(4), row(4), row(4)]
    assert Cost(attention_length=4.0).of(samples, [0]) == (8, 24.0)
    assert Cost(attention_length=4.0).of(samples, [1, 2, 3]) == (12, 24.0)
    assert spread(samples, ranks=2, budget=16, attention_length=4.0) == [[[0]], [[1, 2, 3]]]
    assert spread(samples, ranks=2, budget=16) == [[[0, 3]], [[1, 2]]]


def test_a_group_stays_together_and_its_prompt_counts_once():
    """Two groups of three with prompts of 10 and 20 tokens and completions of 2: 16 and 26 tokens, not 36 and 66."""
    samples = [row(12, prompt=10)] * 3 + [row(22, prompt=20)] * 3
    assert Cost(shares_prompts=True).of(samples, [0, 1, 2]) == (16, 16.0)
    # Behind a prompt of 10, 2 tokens cost 2 + 2 x (2 + 20) / 4 = 13; the prompt 10 + 10 x 10 / 4 = 35.
    assert Cost(4.0, shares_prompts=True).of(samples, [0, 1, 2]) == (16, 35 + 3 * 13)
    assert spread(samples, ranks=1, budget=42, shares_prompts=True) == [[[3, 4, 5, 0, 1, 2]]]
    # A budget that holds no group cuts it, and each part reads the prompt: 24 | 22 + 14 | 12.
    assert spread(samples, ranks=1, budget=24, shares_prompts=True) == [[[3, 4], [5], [0, 1, 2]]]


def test_a_group_too_large_is_cut():
    """Six completions of 10 behind a prompt of 10 over two ranks: halves of 40, better than 70 and nothing."""
    samples = [row(20, prompt=10)] * 6
    parts = spread(samples, ranks=2, budget=100, shares_prompts=True)
    assert sorted(i for rank in parts for rows in rank for i in rows) == list(range(6))
    assert [len(rank) for rank in parts] == [1, 1] and imbalance(samples, parts, Cost(shares_prompts=True)) == 1.0


LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 20)), min_size=0, max_size=40)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(80, 300), st.integers(1, 3), st.booleans())
def test_every_row_once_never_over_the_budget(lengths, ranks, budget, multiple, shares_prompts):
    samples = [row(length + prompt, prompt=prompt) for length, prompt in lengths]
    cost = Cost(100.0, shares_prompts)
    parts = by_cost(samples, range(len(samples)), ranks, budget, multiple, cost)
    assert Counter(i for rank in parts for rows in rank for i in rows) == Counter(range(len(samples)))
    assert all(cost.of(samples, rows)[0] <= budget for rank in parts for rows in rank)
    (count,) = {len(rank) for rank in parts}
    assert len(parts) == ranks and count % multiple == 0
    assert parts == by_cost(samples, range(len(samples)), ranks, budget, multiple, cost)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_long_tailed_lengths_come_out_even(ranks: int, measure):
    """Log-normal, sigma 1: max over mean of cost, against rows dealt out in turn."""
    lengths = (200 * torch.randn(16 * ranks, generator=torch.Generator().manual_seed(1)).exp()).long().clamp(8, 4096)
    samples, cost = [row(int(length)) for length in lengths], Cost(2000.0)
    dealt = imbalance(samples, by_count(range(len(samples)), ranks, 4, 1), cost)
    even = imbalance(samples, by_cost(samples, range(len(samples)), ranks, 4096, 1, cost), cost)
    measure(f"imbalance of {ranks} ranks, dealt", dealt)
    measure(f"imbalance of {ranks} ranks, by cost", even)
    # One row may be dearer than the mean of the ranks: no spreading helps against that.
    unavoidable = max(cost.of(samples, [i])[1] for i in range(len(samples)))
    mean = sum(cost.of(samples, [i])[1] for i in range(len(samples))) / ranks
    assert even <= max(1.05, unavoidable / mean) < dealt


def test_a_longer_row_is_an_error():
    with pytest.raises(AssertionError, match="longer than the budget"):
        spread([row(11)], ranks=1, budget=10)


def test_where_attention_costs_as_much_as_the_rest():
    """Four layers of 2 heads x 8: q, o 16 x 16, k, v 16 x 8, MLP 3 x 16 x 32: 2304 weights and norms of 16 and 16."""
    arch = ModelArchitecture(
        num_layers=4,
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=2,
        num_query_groups=1,
        head_dim=8,
        vocab_size=64,
        max_position_embeddings=128,
        norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=False,
        qkv_bias=False,
        qk_layernorm=False,
        family="llama",
    )
    assert part_costs(arch).layer == 2 * 256 + 2 * 128 + 3 * 512 + 32
    # l^2 / 2 pairs, a multiplication for each of 16 numbers of queries and of values.
    length = attention_length(arch)
    assert length**2 / 2 * (16 + 16) == pytest.approx(length * part_costs(arch).layer)


# --- rows that teach nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", [*LOSS_TYPES])
@pytest.mark.parametrize("level", [*RATIO_LEVELS])
def test_no_loss_has_a_gradient_without_an_advantage(loss_type: Any, level: Any):
    """What skipping rests on, for every loss, off-policy too."""
    objective = build_objective(GRPOConfig(loss_type=loss_type, importance_sampling_level=level), ChordConfig())
    assert not objective.needs_idle_rows
    old = torch.tensor([0.0, -1.0, -2.0, -0.1, -3.0])
    (batch,) = build_global_batch(
        [row(5, prompt=1, advantage=0.0, old_log_probs=old)], BatchLayout(), micro_batch_size=1
    ).micro_batches
    log_probs = torch.tensor([-2.0, -0.5, -3.0, -0.7, 0.0], requires_grad=True)
    result = chord_loss(log_probs, torch.ones(5), batch, objective=objective, mu=0.0)
    (gradient,) = torch.autograd.grad(result.loss, log_probs)
    assert result.loss == 0 and gradient.tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"beta": 0.1}, True),
        ({"beta": 0.1, "kl_in_reward": True}, False),
        ({"entropy_coef": 0.01}, True),
        ({"is_scaled_by_advantage": False}, True),
        ({}, False),
    ],
)
def test_penalty_bonus_and_a_loss_of_ones_own_need_all_rows(changes: dict[str, Any], needed: bool):
    surrogate = partial(LOSS_TYPES["grpo"].surrogate, epsilon=0.2, epsilon_high=0.2)
    assert Objective(surrogate, **changes).needs_idle_rows is needed


def test_idle_rows_are_not_run_and_still_count():
    per_token = torch.tensor([0.0, 0.0, 0.5])
    samples = [
        row(3, prompt=1),
        row(4, prompt=1, advantage=0.0),  # a group without variance
        row(3, prompt=1, advantage=per_token),  # of which one token is learnt
        row(3, prompt=1, advantage=0 * per_token),
        row(5, prompt=1, token_weights=0.0),  # filtered, and counted
        row(2, prompt=2),  # nothing to learn
        row(3, prompt=1, is_expert=True, advantage=0.0),
        row(3, prompt=1, is_expert=True, token_weights=torch.zeros(3)),
    ]
    layout = BatchLayout()
    every = build_global_batch(samples, layout, micro_batch_size=8)
    some = build_global_batch(samples, layout, micro_batch_size=8, skips_idle_rows=True)
    assert some.micro_batches[0].sample_indices == (0, 2, 6)
    assert (every.num_idle_rows, some.num_idle_rows) == (0, 5)
    assert (some.num_rollout_tokens, some.num_run_rollout_tokens) == (every.num_rollout_tokens, 4) == (13, 4)
    assert (some.num_tokens, every.num_tokens) == (9, 26) and some.lengths == every.lengths
    assert set(some.micro_batches[0].rollout_weights.tolist()) - {0.0} == {torch.tensor(1 / 13).item()}
    assert some.num_expert_tokens == every.num_expert_tokens == 4


def test_a_step_of_idle_rows_runs_an_empty_micro_batch():
    batch = build_global_batch(
        [row(3, advantage=0.0)] * 4, BatchLayout(dp_size=2), micro_batch_size=1, skips_idle_rows=True
    )
    assert [micro.sample_indices for micro in batch.micro_batches] == [()] and batch.imbalance == 1.0
    assert (batch.num_tokens, batch.num_idle_rows, batch.num_rollout_tokens) == (0, 4, 8)


def test_dealing_out_by_hand():
    assert by_count([5, 3, 1, 0, 2], 2, 2, 1) == [[[5, 1], [2]], [[3, 0], []]]
    samples = [dataclasses.replace(row(2)) for _ in range(5)]
    assert imbalance(samples, [[[0, 1]], [[2, 3, 4]]], Cost()) == pytest.approx(3 / 2.5)


def test_a_row_beyond_the_budget_is_named():
    lengths = [(expert_name(3), 100), (expert_name(7), 101)]
    refuse_longer_rows(lengths, None)
    refuse_longer_rows(lengths[:1], 100)
    with pytest.raises(UserError) as error:
        refuse_longer_rows(lengths, 100)
    assert str(error.value) == (
        "row 7 of chord.chord_sft_dataset (counted from 0) has 101 tokens, more than "
        "train.max_tokens_per_micro_batch=100; set that to at least 101, or leave out such rows "
        "(chord.chord_sft_max_length, data.max_prompt_length, rollout.max_completion_length)"
    )
