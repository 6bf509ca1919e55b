"""The CHORD mathematics against hand-computed numbers and a naive float64 objective written from the definition."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal, localcontext
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor

from chord_megatron.algorithm.advantages import group_advantages, zero_std_fraction
from chord_megatron.algorithm.aggregation import Aggregation, Mean, aggregation_weights
from chord_megatron.algorithm.diagnosis import EXPERT_PHI, EXPERT_TOKENS, in_deciles
from chord_megatron.algorithm.expert_weights import phi, uniform
from chord_megatron.algorithm.mu import mu_schedule
from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.algorithm.policy_losses import KL_ESTIMATORS, PolicyTokens, clipped_policy_loss
from chord_megatron.algorithm.sequences import Sequences
from chord_megatron.batching.packing import BatchLayout, build_global_batch, pack
from chord_megatron.types import GlobalBatch, MicroBatch, TrainingSample

EPSILON, EPSILON_HIGH = 0.2, 0.28
METRIC_SUMS = {
    *(
        "loss_rollout",
        "loss_expert",
        "entropy",
        "kl",
        "clipped_low",
        "clipped_high",
        "off_policy_masked",
        "phi",
        "log_prob_diff",
    ),
    *("expert_entropy", *in_deciles(EXPERT_TOKENS), *in_deciles(EXPERT_PHI)),
    *("importance_ratio", "importance_ratio_squared", "importance_clipped"),
    "non_finite_rollout_log_probs",
}
FP64_SUM = {"rtol": 0.0, "atol": 1e-13}  # a few dozen float64 terms of size one


# --- advantages -----------------------------------------------------------------------------------------------------


def test_advantages_by_hand_with_unbiased_std():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 2.0, 4.0, 6.0], dtype=torch.float64)
    # mean 1/2, squares 4 * 1/4 over n - 1 = 3; mean 3, squares 9 + 1 + 1 + 9 over 3.
    first, second = math.sqrt(1 / 3) + 1e-6, math.sqrt(20 / 3) + 1e-6
    expected = [0.5 / first, -0.5 / first, -0.5 / first, 0.5 / first]
    expected += [-3 / second, -1 / second, 1 / second, 3 / second]
    torch.testing.assert_close(
        group_advantages(rewards, 4), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15
    )


def test_advantages_group_neighbouring_rewards():
    rewards = torch.tensor([0.0, 2.0, 5.0, 5.0, 7.0, 3.0], dtype=torch.float64)
    pair = 1 / (math.sqrt(2) + 1e-6)  # (0, 2): mean 1, std sqrt(2)
    last = 2 / (math.sqrt(8) + 1e-6)  # (7, 3): mean 5, std sqrt(8)
    assert group_advantages(rewards, 2).tolist() == pytest.approx([-pair, pair, 0, 0, last, -last], abs=1e-15)


def test_advantages_keep_the_dtype_and_are_computed_in_float64():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    result = group_advantages(rewards, 4)
    assert result.dtype == torch.float32
    assert torch.equal(result, group_advantages(rewards.double(), 4).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1 / 3, -2.3, 1e6 + 0.1])
@pytest.mark.parametrize("size", [2, 3, 6, 7, 10])
def test_equal_rewards_have_exactly_zero_advantage(reward: float, size: int, dtype: torch.dtype):
    rewards = torch.full((2 * size,), reward, dtype=dtype)
    rewards[:size] = torch.arange(size)  # a group that varies beside it must not matter
    advantages = group_advantages(rewards, size)
    assert torch.equal(advantages[size:], torch.zeros(size, dtype=dtype))
    assert advantages[:size].isfinite().all() and (advantages[:size] != 0).any()


def test_a_group_of_one_has_advantage_zero():
    assert group_advantages(torch.tensor([3.0, -1.0, 0.5]), 1).tolist() == [0.0, 0.0, 0.0]


def test_nearly_equal_rewards_are_damped_by_the_constant():
    # std = 1e-9 / sqrt(2): the 1e-6 of the denominator dominates.
    difference = 1e-9
    rewards = torch.tensor([0.0, difference], dtype=torch.float64)
    expected = difference / 2 / (difference / math.sqrt(2) + 1e-6)
    assert group_advantages(rewards, 2).tolist() == pytest.approx([-expected, expected], rel=1e-12)


def test_zero_std_fraction_counts_groups():
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0, 0.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.5])
    assert zero_std_fraction(rewards, 3) == 0.5
    assert zero_std_fraction(rewards, 1) == 1.0


# --- mu -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 0.09),
        (5, 0.45),
        (9, 0.81),
        (10, 0.9),  # the peak
        (15, 0.05 + 0.85 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the way: cos(pi / 4)
        (20, 0.475),  # half way
        (25, 0.05 + 0.85 * (1 - math.sqrt(0.5)) / 2),
        (30, 0.05),
        (1000, 0.05),
    ],
)
def test_mu_by_hand(step: int, expected: float):
    mu = mu_schedule(step, peak=0.9, valley=0.05, warmup_steps=10, decay_steps=20)
    assert mu == pytest.approx(expected, abs=1e-15)


def test_mu_reaches_peak_and_valley_exactly():
    paper = {"peak": 0.9, "valley": 0.05, "warmup_steps": 0, "decay_steps": 200}
    assert mu_schedule(0, **paper) == 0.9
    assert mu_schedule(200, **paper) == 0.05
    assert mu_schedule(199, **paper) > 0.05


def test_mu_without_warmup_and_decay_is_the_valley():
    constant = {"peak": 0.9, "valley": 0.1, "warmup_steps": 0, "decay_steps": 0}
    assert [mu_schedule(step, **constant) for step in (0, 1, 500)] == [0.1, 0.1, 0.1]


def test_mu_without_decay_drops_from_warmup_to_the_valley():
    schedule = {"peak": 0.8, "valley": 0.0, "warmup_steps": 4, "decay_steps": 0}
    steps = [mu_schedule(step, **schedule) for step in range(6)]
    assert steps == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.0, 0.0], abs=1e-15)


# --- aggregation weights --------------------------------------------------------------------------------------------


MEANS = [Mean(aggregation, 8) for aggregation in get_args(Aggregation)]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 10, 1 / 10, 1 / 10]),  # one over all tokens
        ("sequence_mean", [1 / 6, 1 / 9, 1 / 15]),  # 1 / (3 sequences * length)
        ("sequence_sum", [1 / 3, 1 / 3, 1 / 3]),
        ("fixed_length", [1 / 24, 1 / 24, 1 / 24]),  # 1 / (3 sequences * 8)
    ],
)
def test_aggregation_weights_by_hand(aggregation: Aggregation, expected: list[float]):
    assert aggregation_weights([2, 3, 5], Mean(aggregation, 8)) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("aggregation", "per_token"),
    [
        ("token_mean", [1 / 6, 1 / 6]),
        ("sequence_mean", [1 / 4, 1 / 8]),
        ("sequence_sum", [1 / 2, 1 / 2]),
        ("fixed_length", [1 / 16, 1 / 16]),
    ],
)
def test_sequences_without_loss_tokens_do_not_count(aggregation: Aggregation, per_token: list[float]):
    weights = aggregation_weights([0, 2, 0, 4], Mean(aggregation, 8))
    assert [weights[1], weights[3]] == pytest.approx(per_token, rel=1e-15)
    assert all(math.isfinite(weight) for weight in weights)


def test_a_sequence_of_one_token_is_a_sequence():
    assert aggregation_weights([1, 3], Mean("sequence_mean")) == pytest.approx([1 / 2, 1 / 6], rel=1e-15)
    assert aggregation_weights([1, 3], Mean("fixed_length", 4)) == [1 / 8, 1 / 8]


@pytest.mark.parametrize("mean", [*MEANS, Mean(rows=2), Mean(rows=1, by_rows=True)])
def test_an_empty_stream_has_zero_weights(mean: Mean):
    assert aggregation_weights([0, 0], mean) == [0.0, 0.0]
    assert aggregation_weights([], mean) == []


@pytest.mark.parametrize(
    ("aggregation", "by_rows", "expected"),
    [
        # Two micro-batches: of 2 + 3 tokens, and of 5.
        ("token_mean", False, [1 / 10, 1 / 10, 1 / 10]),
        ("token_mean", True, [2 / 15, 2 / 15, 1 / 15]),
        ("sequence_mean", False, [1 / 8, 1 / 12, 1 / 10]),
        ("sequence_mean", True, [1 / 6, 1 / 9, 1 / 15]),  # full micro-batches or not: the mean over the step
    ],
)
def test_means_of_micro_batches_by_hand(aggregation: Aggregation, by_rows: bool, expected: list[float]):
    mean = Mean(aggregation, rows=2, by_rows=by_rows)
    assert aggregation_weights([2, 3, 5], mean) == pytest.approx(expected, rel=1e-15)


# --- token losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "is_clipped"),
    [
        (2.0, 1.5, -2 * 1.28, 0.0, True),  # good and too likely already: held
        (2.0, 0.5, -2 * 0.5, -2 * 0.5, False),
        (-2.0, 1.5, 2 * 1.5, 2 * 1.5, False),
        (-2.0, 0.5, 2 * 0.8, 0.0, True),  # bad and unlikely already: held
        (2.0, 1.25, -2 * 1.25, -2 * 1.25, False),  # epsilon would clip, epsilon_high does not
        (-2.0, 0.75, 2 * 0.8, 0.0, True),  # epsilon_high would not clip, epsilon does
        (2.0, 1.0, -2.0, -2.0, False),
        (0.0, 1.5, 0.0, 0.0, False),
    ],
)
def test_clipped_policy_loss_by_hand(advantage, ratio, loss, gradient, is_clipped):
    log_probs = torch.tensor([math.log(ratio) - 1], dtype=torch.float64, requires_grad=True)
    tokens = PolicyTokens(
        log_probs,
        log_ratios=log_probs + 1,  # pi_old has a log-prob of -1
        advantages=torch.tensor([advantage], dtype=torch.float64),
        mask=torch.tensor([True]),
        sequences=Sequences(torch.tensor([0, 1])),
    )
    value, low, high = clipped_policy_loss(tokens, epsilon=EPSILON, epsilon_high=EPSILON_HIGH)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=1e-15)
    assert log_probs.grad.item() == pytest.approx(gradient, abs=1e-15)
    assert (low | high).tolist() == [is_clipped] and not (low & high).any()
    assert low.tolist() == [is_clipped and ratio < 1] and high.tolist() == [is_clipped and ratio > 1]


def test_kl_penalty_by_hand():
    log_probs = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    difference = torch.tensor([math.log(2), 0.0, -math.log(2)], dtype=torch.float64)
    penalty = KL_ESTIMATORS["k3"](log_probs, log_probs.detach() + difference)
    penalty.sum().backward()
    assert penalty.tolist() == pytest.approx([1 - math.log(2), 0.0, math.log(2) - 0.5], abs=1e-15)
    assert penalty[1].item() == 0.0
    assert log_probs.grad.tolist() == pytest.approx([-1.0, 0.0, 0.5], abs=1e-15)  # 1 - e^d


def test_kl_penalty_is_never_negative_in_float32():
    size = torch.logspace(-12, 1, 100_001)
    assert (KL_ESTIMATORS["k3"](torch.zeros(200_002), torch.cat([size, -size])) >= 0).all()


def test_phi_keeps_its_digits_near_one():
    log_probs = torch.tensor([-1e-9, -1e-7, -1e-4, -0.01, -math.log(2), -3.0, -20.0])
    with localcontext() as context:
        context.prec = 50
        exact = [Decimal(value).exp() * (1 - Decimal(value).exp()) for value in log_probs.tolist()]
    # Two function values and a product: below three units in the last place.
    assert phi(log_probs, torch.zeros(7)).tolist() == pytest.approx([float(value) for value in exact], rel=3 * 2**-23)


def test_the_uniform_weight_is_one():
    weights = uniform(torch.tensor([-0.5, -3.0], requires_grad=True), torch.zeros(2))
    assert weights.tolist() == [1.0, 1.0] and not weights.requires_grad


def test_phi_is_detached_and_peaks_at_one_half():
    log_probs = torch.tensor([math.log(0.5), math.log(0.25), 0.0], dtype=torch.float64, requires_grad=True)
    weights = phi(log_probs, torch.zeros(3))
    assert not weights.requires_grad
    assert weights.tolist() == pytest.approx([0.25, 0.1875, 0.0], abs=1e-16)


# --- sequences ------------------------------------------------------------------------------------------------------


def test_sums_and_means_of_sequences_by_hand():
    sequences = Sequences(torch.tensor([0, 2, 3, 6], dtype=torch.int32))
    values = torch.tensor([1.0, 3.0, 5.0, 0.0, 4.0, 2.0])
    assert sequences.sum(values).tolist() == [4.0, 4.0, 5.0, 6.0, 6.0, 6.0]
    mask = torch.tensor([True, True, True, False, True, True])
    assert sequences.mean(values, mask).tolist() == [2.0, 2.0, 5.0, 3.0, 3.0, 3.0]
    assert sequences.mean(torch.zeros(6), torch.zeros(6, dtype=torch.bool)).tolist() == [0.0] * 6


# --- the objective --------------------------------------------------------------------------------------------------


def make_samples(*, off_policy: bool, with_ref: bool) -> list[TrainingSample]:
    """Five rollouts (one of them filtered out) and two expert answers of unequal lengths.

    The 16 rollout tokens of 4 sequences of 2, 2, 4 and 8 tokens, the 8 expert tokens and the advantages make
    every float32 weight exact, so that the comparison with float64 is tight.
    """
    generator = torch.Generator().manual_seed(1)
    samples = []
    # prompt length, answer length, advantage (None = expert)
    rows = [(3, 2, 0.75), (2, 3, None), (1, 2, -1.5), (5, 4, 1.25), (4, 3, None), (4, 5, None), (2, 8, -0.5)]
    for prompt, answer, advantage in rows:
        length = prompt + answer
        # Row 4 is a rollout that the overlong filter took out.
        is_filtered = (prompt, answer) == (4, 3)
        is_expert = advantage is None and not is_filtered

        def draw(length=length) -> Tensor:
            return -0.05 - 2.5 * torch.rand(length, generator=generator)

        samples.append(
            TrainingSample(
                tokens=torch.randint(0, 50, (length,), generator=generator),
                loss_mask=(torch.arange(length) >= prompt) & (not is_filtered),
                is_expert=is_expert,
                temperature=1.0,
                advantage=advantage or 0.0,
                rollout_log_probs=None if is_expert else draw(),
                old_log_probs=draw() if off_policy and not is_expert else None,
                ref_log_probs=draw() if with_ref and not is_expert else None,
            )
        )
    return samples


def make_log_probs(samples: list[TrainingSample]) -> list[Tensor]:
    """For each sample [length]: the log-prob of the token at each position; the first is never predicted."""
    generator = torch.Generator().manual_seed(2)
    return [
        (-0.05 - 2.5 * torch.rand(len(sample.tokens), generator=generator, dtype=torch.float64)).requires_grad_()
        for sample in samples
    ]


MEAN_OF = {"dapo": Mean(), "grpo": Mean("sequence_mean"), "dr_grpo": Mean("fixed_length", 16)}


def naive_objective(
    samples, log_probs, *, mu, use_phi, beta, loss_type, epsilon=EPSILON, epsilon_high=EPSILON_HIGH
) -> tuple[Tensor, Tensor]:
    """(loss_rollout, loss_expert) of the definition, one token at a time, in float64."""
    streams: dict[bool, list[tuple[TrainingSample, Tensor, list[int]]]] = {False: [], True: []}
    for sample, values in zip(samples, log_probs):
        tokens = [t for t in range(1, len(sample.tokens)) if sample.loss_mask[t]]
        if tokens:
            streams[sample.is_expert].append((sample, values, tokens))
    zero = torch.zeros((), dtype=torch.float64)
    loss_rollout, loss_expert = zero, zero
    num_rollout = sum(len(tokens) for _, _, tokens in streams[False])
    num_expert = sum(len(tokens) for _, _, tokens in streams[True])
    for sample, values, tokens in streams[False]:
        weight = {
            "dapo": 1 / max(num_rollout, 1),
            "grpo": 1 / (len(streams[False]) * len(tokens)),
            "dr_grpo": 1 / (len(streams[False]) * 16),
        }[loss_type]
        for t in tokens:
            old = values[t].detach() if sample.old_log_probs is None else sample.old_log_probs[t].double()
            ratio = torch.exp(values[t] - old)
            clipped = min(max(ratio, zero + 1 - epsilon), zero + 1 + epsilon_high)
            loss = -min(ratio * sample.advantage, clipped * sample.advantage)
            if sample.ref_log_probs is not None:
                d = sample.ref_log_probs[t].double() - values[t]
                loss = loss + beta * (torch.exp(d) - d - 1)
            loss_rollout = loss_rollout + weight * loss
    for _, values, tokens in streams[True]:
        for t in tokens:
            p = torch.exp(values[t].detach())
            loss_expert = loss_expert - (p * (1 - p) if use_phi else 1.0) * values[t] / num_expert
    return loss_rollout, loss_expert


def place(batch: MicroBatch, rows: list[Tensor], outside: float = -0.3) -> Tensor:
    """`rows` as the [tokens] tensor of a micro-batch, with a log-prob of nothing after each sequence and in padding."""
    filler = torch.full((1,), outside, dtype=torch.float64)
    parts = [part for index in batch.sample_indices for part in (rows[index][1:], filler)]
    padding = len(batch.input_ids) - batch.num_tokens
    return torch.cat([*parts, filler.expand(padding)])


def make_objective(*, beta: float, use_phi: bool, epsilon=EPSILON, epsilon_high=EPSILON_HIGH) -> Objective:
    return Objective(
        policy_loss=partial(clipped_policy_loss, epsilon=epsilon, epsilon_high=epsilon_high),
        expert_weight=phi if use_phi else uniform,
        beta=beta,
    )


def sum_over_batches(
    batches: list[GlobalBatch], rows: list[Tensor], *, mu: float, **settings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metric sums of a step: plain sums over its micro-batches and ranks."""
    results = []
    for batch in (micro for one_rank in batches for micro in one_rank.micro_batches):
        values = place(batch, rows)
        results.append(chord_loss(values, values.detach().abs(), batch, objective=make_objective(**settings), mu=mu))
    sums = {name: torch.stack([result.sums[name] for result in results]).sum() for name in results[0].sums}
    return torch.stack([result.loss for result in results]).sum(), sums


def gradients(loss: Tensor, rows: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, rows, allow_unused=True, materialize_grads=True))


def one_rank(samples, layout=BatchLayout(), *, micro_batch_size=100, **settings) -> GlobalBatch:  # noqa: B008 (frozen)
    return build_global_batch(samples, layout, micro_batch_size=micro_batch_size, **settings)


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("use_phi", [False, True])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_chord_loss_equals_the_definition(mu, use_phi, off_policy, beta, loss_type):
    samples = make_samples(off_policy=off_policy, with_ref=beta > 0)
    rows = make_log_probs(samples)
    rollout, expert = naive_objective(samples, rows, mu=mu, use_phi=use_phi, beta=beta, loss_type=loss_type)
    expected = (1 - mu) * rollout + mu * expert

    batch = one_rank(samples, BatchLayout(pad_to_multiple=8), rollout_mean=MEAN_OF[loss_type])
    loss, sums = sum_over_batches([batch], rows, mu=mu, beta=beta, use_phi=use_phi)

    torch.testing.assert_close(loss, expected, **FP64_SUM)
    streams = torch.stack([sums["loss_rollout"], sums["loss_expert"]])
    torch.testing.assert_close(streams, torch.stack([rollout, expert]).detach(), **FP64_SUM)
    for actual, wanted in zip(gradients(loss, rows), gradients(expected, rows)):
        torch.testing.assert_close(actual, wanted, **FP64_SUM)


def test_the_definition_is_exercised_where_it_bends():
    """The samples above hold clipped and unclipped tokens of both signs; else the test above proves little."""
    samples = make_samples(off_policy=True, with_ref=False)
    seen = set()
    for sample, values in zip(samples, make_log_probs(samples)):
        if sample.old_log_probs is not None and sample.advantage:
            ratios = (values.detach() - sample.old_log_probs.double()).exp()[sample.loss_mask]
            sides = (ratios < 1 - EPSILON).int() * -1 + (ratios > 1 + EPSILON_HIGH).int()
            seen |= {(sample.advantage > 0, side) for side in sides.tolist()}
    assert seen >= {(True, 1), (True, -1), (False, 1), (False, -1)}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle_seed", [None, 5])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_loss_does_not_depend_on_the_split(micro_batch_size, dp_size, shuffle_seed, loss_type):
    samples = make_samples(off_policy=True, with_ref=True)
    rows = make_log_probs(samples)
    settings = {"mu": 0.3, "beta": 0.1, "use_phi": True}
    whole, whole_sums = sum_over_batches([one_rank(samples, rollout_mean=MEAN_OF[loss_type])], rows, **settings)
    parts = [
        one_rank(
            samples,
            BatchLayout(dp_rank=rank, dp_size=dp_size, pad_to_multiple=4, micro_batch_multiple=2),
            rollout_mean=MEAN_OF[loss_type],
            micro_batch_size=micro_batch_size,
            shuffle_seed=shuffle_seed,
        )
        for rank in range(dp_size)
    ]
    loss, sums = sum_over_batches(parts, rows, **settings)
    torch.testing.assert_close(loss, whole, **FP64_SUM)
    for name, value in whole_sums.items():
        torch.testing.assert_close(sums[name], value, **FP64_SUM)
    for actual, wanted in zip(gradients(loss, rows), gradients(whole, rows)):
        torch.testing.assert_close(actual, wanted, **FP64_SUM)


def test_an_arbitrary_step_within_the_rounding_of_its_float32_weights():
    """Token counts that are no powers of two: each weight is off by at most one part in 2^24."""
    samples = [*make_samples(off_policy=True, with_ref=False)[1:4], *make_samples(off_policy=True, with_ref=False)]
    rows = make_log_probs(samples)
    rollout, expert = naive_objective(samples, rows, mu=0.3, use_phi=False, beta=0.0, loss_type="grpo")
    batch = one_rank(samples, rollout_mean=MEAN_OF["grpo"], micro_batch_size=2)
    loss, _ = sum_over_batches([batch], rows, mu=0.3, beta=0.0, use_phi=False)
    # |l_t| <= 1.5 * e^2.5 for the ratios drawn, and both streams' weights sum to 1.
    assert abs(loss.item() - (0.7 * rollout + 0.3 * expert).item()) <= 2**-24 * 1.5 * math.exp(2.5)


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_a_micro_batch_without_loss_tokens_contributes_zero_and_stays_attached(mu: float):
    padding_only = pack([], [], [], pad_to_multiple=4)
    prompt_only = dataclasses.replace(
        make_samples(off_policy=False, with_ref=True)[0], loss_mask=torch.zeros(5, dtype=torch.bool)
    )
    for batch in (padding_only, one_rank([prompt_only]).micro_batches[0]):
        log_probs = torch.full(batch.input_ids.shape, -0.5, requires_grad=True)
        objective = make_objective(beta=0.1, use_phi=True)
        loss, sums, maxima, _ = chord_loss(log_probs, torch.ones_like(log_probs), batch, objective=objective, mu=mu)
        loss.backward()
        assert loss.item() == 0.0
        assert torch.equal(log_probs.grad, torch.zeros_like(log_probs))
        assert set(sums) == METRIC_SUMS
        assert all(value.item() == 0.0 for value in (*sums.values(), *maxima.values()))


@pytest.mark.parametrize("only_expert", [False, True])
def test_one_empty_stream_leaves_the_other(only_expert: bool):
    samples = [s for s in make_samples(off_policy=False, with_ref=False) if s.is_expert == only_expert]
    rows = make_log_probs(samples)
    loss, sums = sum_over_batches([one_rank(samples)], rows, mu=0.25, beta=0.0, use_phi=False)
    rollout, expert = naive_objective(samples, rows, mu=0.25, use_phi=False, beta=0.0, loss_type="dapo")
    assert sums["loss_rollout" if only_expert else "loss_expert"].item() == 0.0
    torch.testing.assert_close(loss, 0.25 * expert if only_expert else 0.75 * rollout, rtol=1e-6, atol=0)


def test_zero_advantages_still_train_the_expert_term():
    samples = [dataclasses.replace(s, advantage=0.0) for s in make_samples(off_policy=True, with_ref=False)]
    rows = make_log_probs(samples)
    loss, sums = sum_over_batches([one_rank(samples)], rows, mu=0.5, beta=0.0, use_phi=False)
    assert sums["loss_rollout"].item() == 0.0
    for sample, gradient in zip(samples, gradients(loss, rows)):
        expected = -0.5 / 8 * sample.loss_mask.double() if sample.is_expert else torch.zeros_like(gradient)
        assert torch.equal(gradient, expected)  # mu * 1/8 on each expert token, exact in float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("outside", [-1e4, 0.0])
def test_values_outside_the_mask_do_not_matter(outside: float, dtype: torch.dtype):
    samples = make_samples(off_policy=True, with_ref=True)
    batch = one_rank(samples, BatchLayout(pad_to_multiple=8)).micro_batches[0]
    counts = batch.counts
    assert torch.equal(counts, (batch.rollout_weights > 0) | (batch.expert_weights > 0))
    # Opposite extremes: e^(log_prob - old) and e^(ref - log_prob) both overflow.
    batch = dataclasses.replace(
        batch,
        old_log_probs=torch.where(counts, batch.old_log_probs, -1e4 - outside),
        ref_log_probs=torch.where(counts, batch.ref_log_probs, 0.0),
    )
    inside = torch.where(counts, place(batch, make_log_probs(samples)), torch.tensor(-1.0).double()).detach()
    results = []
    for filler in (-1.0, outside):
        log_probs = torch.where(counts, inside, filler).to(dtype).requires_grad_()
        loss, sums, maxima, _ = chord_loss(
            log_probs,
            torch.where(counts, 1.0, torch.nan),
            batch,
            objective=make_objective(beta=0.1, use_phi=True),
            mu=0.3,
        )
        loss.backward()
        assert torch.equal(log_probs.grad[~counts], torch.zeros_like(log_probs)[~counts])
        results.append((loss.detach(), *sums.values(), *maxima.values(), log_probs.grad))
    for plain, extreme in zip(*results):
        assert extreme.isfinite().all() and torch.equal(plain, extreme)


def test_metric_sums_by_hand():
    rollout = TrainingSample(
        tokens=torch.tensor([7, 8, 9]),
        loss_mask=torch.tensor([False, True, True]),
        is_expert=False,
        temperature=1.0,
        advantage=2.0,
        rollout_log_probs=torch.tensor([0.0, -1.5, -0.25]),
        old_log_probs=torch.tensor([0.0, -1.0, -1.0]),
        ref_log_probs=torch.tensor([0.0, -0.5, -2.0]),
    )
    expert = TrainingSample(
        tokens=torch.tensor([3, 4]), loss_mask=torch.tensor([False, True]), is_expert=True, temperature=1.0
    )
    batch = one_rank([rollout, expert]).micro_batches[0]
    # Rollout log-probs give the ratios 1.5 (clipped at 1.28, as A > 0) and 0.5; the expert token has p = 1/4.
    a, b, y = math.log(1.5) - 1, math.log(0.5) - 1, math.log(0.25)
    log_probs = torch.tensor([a, b, -9.0, y, -9.0], dtype=torch.float64, requires_grad=True)
    entropy = torch.tensor([0.5, 0.125, 64.0, 16.0, 64.0], dtype=torch.float64)
    objective = make_objective(beta=0.5, use_phi=True, epsilon=0.2, epsilon_high=0.28)
    loss, sums, maxima, rows = chord_loss(log_probs, entropy, batch, objective=objective, mu=0.25)
    kl = [math.exp(-0.5 - a) - (-0.5 - a) - 1, math.exp(-2 - b) - (-2 - b) - 1]
    loss_rollout = (-2 * 1.28 - 2 * 0.5 + 0.5 * sum(kl)) / 2
    loss_expert = 0.1875 * math.log(4)
    expected = {
        "loss_rollout": loss_rollout,
        "loss_expert": loss_expert,
        "entropy": 0.625,
        "kl": sum(kl),
        "off_policy_masked": 0.0,
        "clipped_low": 0.0,
        "clipped_high": 1.0,
        "phi": 0.1875,
        "expert_entropy": 16.0,
        **dict.fromkeys((*in_deciles(EXPERT_TOKENS), *in_deciles(EXPERT_PHI)), 0.0),
        "expert_tokens_2": 1.0,  # 0.2 <= 1/4 < 0.3
        "expert_phi_2": 0.1875,
        "log_prob_diff": abs(a + 1.5) + abs(b + 0.25),
        "importance_ratio": math.exp(0.5) + math.exp(-0.75),
        "importance_ratio_squared": math.exp(1.0) + math.exp(-1.5),
        "importance_clipped": 0.0,
        "non_finite_rollout_log_probs": 0.0,
    }
    assert set(expected) == METRIC_SUMS
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(expected, abs=1e-14)
    assert loss.item() == pytest.approx(0.75 * loss_rollout + 0.25 * loss_expert, abs=1e-14)
    assert maxima["log_prob_diff"].item() == pytest.approx(abs(b + 0.25), abs=1e-15) and len(maxima) == 1
    of_rows = {"log_prob": [0.0, y], "phi": [0.0, 0.1875], "teaching_tokens": [2.0, 0.0]}
    assert {name: value.tolist() for name, value in rows.items()} == {
        name: pytest.approx(values, abs=1e-14) for name, values in of_rows.items()
    }
    assert not any(value.requires_grad for value in (*sums.values(), *maxima.values(), *rows.values()))


def test_phi_is_reported_where_it_does_not_weigh():
    samples = [s for s in make_samples(off_policy=False, with_ref=False) if s.is_expert]
    rows = make_log_probs(samples)
    p = torch.cat([row.detach()[sample.loss_mask] for row, sample in zip(rows, samples)]).exp()
    _, plain = sum_over_batches([one_rank(samples)], rows, mu=1.0, beta=0.0, use_phi=False)
    assert plain["phi"].item() == pytest.approx((p * (1 - p)).sum().item(), abs=1e-14)
    assert plain["loss_expert"].item() == pytest.approx(-p.log().mean().item(), abs=1e-14)


def test_a_token_may_count_and_weigh_nothing():
    """Masks say which tokens count, weights how much: the metrics see a token whose weight is 0."""
    samples = make_samples(off_policy=True, with_ref=False)
    batch = one_rank(samples).micro_batches[0]
    silent = dataclasses.replace(batch, rollout_weights=torch.zeros_like(batch.rollout_weights))
    values = place(batch, make_log_probs(samples))
    objective = make_objective(beta=0.0, use_phi=False)
    plain, muted = (
        chord_loss(values, values.detach().abs(), each, objective=objective, mu=0.5) for each in (batch, silent)
    )
    assert muted.sums["loss_rollout"].item() == 0.0
    assert all(torch.equal(muted.sums[name], plain.sums[name]) for name in METRIC_SUMS - {"loss_rollout"})
    assert plain.rows["teaching_tokens"].tolist() == [2, 0, 2, 4, 0, 0, 8] and not muted.rows["teaching_tokens"].any()
    assert torch.equal(silent.counts, batch.counts)


def test_the_ratio_level_reaches_the_policy_loss():
    """A level of the user's: each token takes its sequence's geometric mean, and so do its gradient's bounds."""
    samples = make_samples(off_policy=True, with_ref=False)
    batch = one_rank(samples).micro_batches[0]
    rows = make_log_probs(samples)
    values = place(batch, rows)

    def sequence_level(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, sequences: Sequences) -> Tensor:
        return sequences.mean(torch.where(mask, log_probs - old_log_probs, 0.0), mask)

    objective = dataclasses.replace(make_objective(beta=0.0, use_phi=False), ratio_level=sequence_level)
    loss = chord_loss(values, values.detach(), batch, objective=objective, mu=0.0).loss
    expected = torch.zeros((), dtype=torch.float64)
    for sample, row in zip(samples, rows):
        if not sample.is_expert and sample.loss_mask.any():
            mean = (row - sample.old_log_probs.double())[sample.loss_mask].mean()
            ratio, advantage = mean.exp(), sample.advantage
            clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH)
            expected = expected - int(sample.loss_mask.sum()) / 16 * torch.min(ratio * advantage, clipped * advantage)
    torch.testing.assert_close(loss, expected, **FP64_SUM)


def test_an_expert_weight_sees_the_entropy_of_its_token():
    """A weight of the user's, without gradient whatever it is made of."""
    samples = make_samples(off_policy=False, with_ref=False)
    batch = one_rank(samples).micro_batches[0]
    values = place(batch, make_log_probs(samples))
    entropy = (1 + torch.arange(len(values), dtype=torch.float64)).requires_grad_()
    objective = dataclasses.replace(
        make_objective(beta=0.0, use_phi=False), expert_weight=lambda log_probs, entropy: entropy - log_probs
    )
    loss = chord_loss(values, entropy, batch, objective=objective, mu=1.0).loss
    weights = batch.expert_weights.double() * (entropy - values).detach()
    torch.testing.assert_close(loss, -(weights * values).sum(), **FP64_SUM)
    by_values, by_entropy = torch.autograd.grad(loss, (values, entropy), allow_unused=True)
    assert by_entropy is None
    torch.testing.assert_close(by_values, -weights, **FP64_SUM)


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_losses_in_float32_are_summed_in_float64(mu: float):
    samples = make_samples(off_policy=False, with_ref=False)
    batch = one_rank(samples).micro_batches[0]
    log_probs = place(batch, make_log_probs(samples)).float().detach()
    objective = make_objective(beta=0.0, use_phi=False)
    loss = chord_loss(log_probs, -log_probs, batch, objective=objective, mu=mu).loss
    # On-policy: the ratio is 1.
    products = batch.rollout_weights * -batch.advantages if mu == 0 else batch.expert_weights * -log_probs
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(products.double().sum().item(), rel=0, abs=1e-16 * len(products))
