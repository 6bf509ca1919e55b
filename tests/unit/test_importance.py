"""Importance weights against hand-computed numbers, and the weighted loss against a naive float64 definition."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from chord_megatron.algorithm.expert_weights import phi, uniform
from chord_megatron.algorithm.importance import (
    MAX_LOG_RATIO,
    ImportanceCorrection,
    ImportanceSamplingMode,
    importance_weights,
    log_importance_ratios,
)
from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.algorithm.policy_losses import clipped_policy_loss
from chord_megatron.algorithm.sequences import Sequences
from chord_megatron.batching.packing import BatchLayout, build_global_batch, pack
from chord_megatron.tracking.step_metrics import loss_metrics
from chord_megatron.types import GlobalBatch, LossTotals, TrainingSample

MODES = get_args(ImportanceSamplingMode)
EPSILON, EPSILON_HIGH, THRESHOLD = 0.2, 0.28, 1.5
FP64_SUM = {"rtol": 0.0, "atol": 1e-13}  # a few dozen float64 terms of size one


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "expected", "clipped"),
    [
        ("token_truncate", [3, 1, 3, 0.25, 3], [True, False, True, False, True]),
        ("token_mask", [0, 1, 0, 0.25, 0], [True, False, True, False, True]),
        # The geometric means: sqrt(4 * 1) = 2, 9, and sqrt(0.25 * 4) = 1.
        ("sequence_truncate", [2, 2, 3, 1, 1], [False, False, True, False, False]),
        ("sequence_mask", [4, 1, 0, 0.25, 4], [False, False, True, False, False]),
    ],
)
def test_weights_by_hand(mode: str, expected: list[float], clipped: list[bool]):
    """Three completions of 2, 1 and 2 tokens among prompts, last positions and padding."""
    nothing = 1e3
    ratios = [nothing, 4, 1, nothing, 9, nothing, 0.25, 4, nothing, nothing]
    mask = torch.tensor([ratio != nothing for ratio in ratios])
    old = torch.tensor(ratios, dtype=torch.float64).log() - 2
    log_ratios = log_importance_ratios(old, torch.full((10,), -2.0), mask)
    sequences = Sequences(torch.tensor([0, 4, 6, 9, 10], dtype=torch.int32))
    weights, is_clipped = importance_weights(log_ratios, mask, sequences, ImportanceCorrection(mode, 3.0))
    assert weights.dtype == torch.float64
    assert weights[mask].tolist() == pytest.approx(expected, abs=1e-15, rel=1e-15)
    assert is_clipped[mask].tolist() == clipped
    assert weights.isfinite().all() and not is_clipped[~mask].any()


@pytest.mark.parametrize("mode", MODES)
def test_a_ratio_at_the_threshold_is_within_it(mode: str):
    mask = torch.ones(2, dtype=torch.bool)
    sequences, correction = Sequences(torch.tensor([0, 2])), ImportanceCorrection(mode, 1.0)
    level, bound = mode.split("_")
    # e^0 is exactly 1, and so is the geometric mean of e^a and e^-a.
    log_ratios = torch.tensor([0.0, 0.0] if level == "token" else [0.75, -0.75], dtype=torch.float64)
    weights, is_clipped = importance_weights(log_ratios, mask, sequences, correction)
    assert not is_clipped.any()
    assert torch.equal(weights, log_ratios.exp() if bound == "mask" else torch.ones(2, dtype=torch.float64))

    weights, is_clipped = importance_weights(log_ratios + 1e-12, mask, sequences, correction)
    assert is_clipped.all()
    assert weights.tolist() == ([0.0, 0.0] if bound == "mask" else [1.0, 1.0])


def test_log_ratios_are_bounded_and_zero_outside_the_mask():
    old = torch.tensor([-1.0, 0.0, -1e4, -1e4, math.nan, -math.inf])
    rollout = torch.tensor([-1.5, -1e4, 0.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([True, True, True, False, False, False])
    log_ratios = log_importance_ratios(old.requires_grad_(), rollout, mask)
    assert log_ratios.dtype == torch.float64 and not log_ratios.requires_grad
    assert log_ratios.tolist() == [0.5, MAX_LOG_RATIO, -MAX_LOG_RATIO, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("mode", MODES)
def test_a_log_prob_that_is_not_a_number_stays_one(mode: str):
    """It must reach the loss, whose step is then skipped, and not be taken for a small weight."""
    mask = torch.tensor([True, True])
    log_ratios = log_importance_ratios(torch.tensor([math.nan, -1.0]), torch.tensor([-1.0, -1.0]), mask)
    correction = ImportanceCorrection(mode, 2.0)
    weights, _ = importance_weights(log_ratios, mask, Sequences(torch.tensor([0, 2])), correction)
    assert weights[0].isnan()


def test_what_the_sampler_could_not_compute_has_the_ratio_1():
    sampled = torch.tensor([math.nan, math.inf, -math.inf, -2.5])
    assert log_importance_ratios(torch.full((4,), -2.0), sampled, torch.ones(4, dtype=torch.bool)).tolist() == [
        0.0,
        0.0,
        0.0,
        0.5,
    ]


@pytest.mark.parametrize("mode", MODES)
def test_weights_do_not_depend_on_the_packing(mode: str):
    """Bitwise: alone, or beside others, in any order, with or without padding."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 3, 7, 50, 301]
    rows = [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]
    masks = [torch.rand(n, generator=generator) < 0.7 for n in lengths]
    rows = [torch.where(mask, row, 0.0) for row, mask in zip(rows, masks)]

    def weigh(order: list[int], padding: int) -> dict[int, list[Tensor]]:
        sizes = [lengths[i] for i in order]
        bounds = torch.tensor([0, *sizes, *([padding] if padding else [])]).cumsum(0).to(torch.int32)
        weights, is_clipped = importance_weights(
            torch.cat([*[rows[i] for i in order], torch.zeros(padding, dtype=torch.float64)]),
            torch.cat([*[masks[i] for i in order], torch.zeros(padding, dtype=torch.bool)]),
            Sequences(bounds),
            ImportanceCorrection(mode, 1.1),
        )
        parts = zip(weights.split([*sizes, padding]), is_clipped.split([*sizes, padding]))
        return dict(zip(order, map(list, parts)))

    alone = {i: weigh([i], padding=0)[i] for i in range(len(rows))}
    assert 0 < sum(int(is_clipped.sum()) for _, is_clipped in alone.values()) < sum(int(m.sum()) for m in masks)
    for order, padding in (([0, 1, 2, 3, 4, 5], 0), ([5, 3, 1, 4, 2, 0], 5), ([4, 0, 5], 1)):
        for index, (weights, is_clipped) in weigh(order, padding).items():
            assert torch.equal(weights, alone[index][0]) and torch.equal(is_clipped, alone[index][1])


# --- the weighted loss ----------------------------------------------------------------------------------------------


def make_samples(*, off_policy: bool, with_ref: bool = False) -> list[TrainingSample]:
    """Four rollouts of 2, 1, 5 and 8 tokens and one expert answer of 4.

    16 rollout tokens make every float32 weight exact, so that the comparison with float64 is tight.
    """
    generator = torch.Generator().manual_seed(1)
    samples = []
    for prompt, answer, advantage in [(3, 2, 0.75), (1, 1, -1.5), (2, 4, None), (4, 5, 1.25), (2, 8, -0.5)]:
        length = prompt + answer
        is_expert = advantage is None

        def draw(length=length) -> Tensor:
            return -0.05 - 2.0 * torch.rand(length, generator=generator)

        samples.append(
            TrainingSample(
                tokens=torch.randint(0, 50, (length,), generator=generator),
                loss_mask=torch.arange(length) >= prompt,
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
        (-0.05 - 2.0 * torch.rand(len(sample.tokens), generator=generator, dtype=torch.float64)).requires_grad_()
        for sample in samples
    ]


def naive_weights(ratios: list[float], mode: str, threshold: float) -> list[float]:
    """The four definitions, one completion at a time."""
    of_sequence = math.prod(ratios) ** (1 / len(ratios))
    if mode == "token_truncate":
        return [min(ratio, threshold) for ratio in ratios]
    if mode == "token_mask":
        return [ratio if ratio <= threshold else 0.0 for ratio in ratios]
    if mode == "sequence_truncate":
        return [min(of_sequence, threshold)] * len(ratios)
    assert mode == "sequence_mask"
    return ratios if of_sequence <= threshold else [0.0] * len(ratios)


def weights_of(sample: TrainingSample, log_probs: Tensor, mode: str) -> Tensor:
    """[length] the naive weights of a rollout; 0 outside its loss mask."""
    old = log_probs.detach() if sample.old_log_probs is None else sample.old_log_probs.double()
    ratios = (old - sample.rollout_log_probs.double())[sample.loss_mask].exp().tolist()
    weights = torch.zeros(len(sample.tokens), dtype=torch.float64)
    weights[sample.loss_mask] = torch.tensor(naive_weights(ratios, mode, THRESHOLD), dtype=torch.float64)
    return weights


def naive_rollout_loss(samples: list[TrainingSample], rows: list[Tensor], mode: str, beta: float) -> Tensor:
    """The token mean of weight x clipped loss + beta x penalty."""
    total = torch.zeros((), dtype=torch.float64)
    for sample, log_probs in zip(samples, rows):
        if sample.is_expert:
            continue
        weights = weights_of(sample, log_probs, mode)
        for t in torch.nonzero(sample.loss_mask).flatten().tolist():
            old = log_probs[t].detach() if sample.old_log_probs is None else sample.old_log_probs[t].double()
            ratio = torch.exp(log_probs[t] - old)
            clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH)
            total = total - weights[t] * torch.min(ratio * sample.advantage, clipped * sample.advantage)
            if sample.ref_log_probs is not None:
                difference = sample.ref_log_probs[t].double() - log_probs[t]
                total = total + beta * (torch.exp(difference) - difference - 1)
    return total / sum(int(sample.loss_mask.sum()) for sample in samples if not sample.is_expert)


def make_objective(
    *, beta: float = 0.0, use_phi: bool = False, importance: ImportanceCorrection | None = None
) -> Objective:
    return Objective(
        policy_loss=partial(clipped_policy_loss, epsilon=EPSILON, epsilon_high=EPSILON_HIGH),
        expert_weight=phi if use_phi else uniform,
        beta=beta,
        importance=importance,
    )


def totals_over_batches(
    batches: list[GlobalBatch], rows: list[Tensor], *, mu: float = 0.25, **settings: Any
) -> tuple[Tensor, LossTotals]:
    """Loss and metrics of a step; positions that predict nothing of a sequence get a log-prob of nothing."""
    filler = torch.full((1,), -0.3, dtype=torch.float64)
    results = []
    for batch in (micro for of_rank in batches for micro in of_rank.micro_batches):
        parts = [part for index in batch.sample_indices for part in (rows[index][1:], filler)]
        values = torch.cat([*parts, filler.expand(len(batch.input_ids) - batch.num_tokens)])
        results.append(chord_loss(values, values.detach().abs(), batch, objective=make_objective(**settings), mu=mu))
    sums = {name: sum(result.sums[name].item() for result in results) for name in results[0].sums}
    maxima = {name: max(result.maxima[name].item() for result in results) for name in results[0].maxima}
    return torch.stack([result.loss for result in results]).sum(), LossTotals(sums, maxima, {})


def sum_over_batches(
    batches: list[GlobalBatch], rows: list[Tensor], **settings: Any
) -> tuple[Tensor, dict[str, float]]:
    loss, totals = totals_over_batches(batches, rows, **settings)
    return loss, totals.sums


def one_rank(
    samples: list[TrainingSample],
    layout: BatchLayout = BatchLayout(),  # noqa: B008 (frozen)
    *,
    micro_batch_size=100,
    **settings,
) -> GlobalBatch:
    return build_global_batch(samples, layout, micro_batch_size=micro_batch_size, **settings)


def weighted(mode: str | None) -> dict[str, Any]:
    return {"importance": None if mode is None else ImportanceCorrection(mode, THRESHOLD)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_weighted_loss_equals_the_definition(mode: str, off_policy: bool, beta: float):
    samples = make_samples(off_policy=off_policy, with_ref=beta > 0)
    rows = make_log_probs(samples)
    expected = naive_rollout_loss(samples, rows, mode, beta)
    batch = one_rank(samples, BatchLayout(pad_to_multiple=8))
    loss, sums = sum_over_batches([batch], rows, mu=0.0, beta=beta, **weighted(mode))
    torch.testing.assert_close(loss, expected, **FP64_SUM)
    assert sums["loss_rollout"] == loss.item()
    wanted = torch.autograd.grad(expected, rows, allow_unused=True, materialize_grads=True)
    for actual, gradient in zip(torch.autograd.grad(loss, rows), wanted):
        torch.testing.assert_close(actual, gradient, **FP64_SUM)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("off_policy", [False, True])
def test_each_gradient_is_the_weight_times_the_plain_one(mode: str, off_policy: bool):
    samples = make_samples(off_policy=off_policy)
    rows = make_log_probs(samples)
    batches = [one_rank(samples, micro_batch_size=2)]
    plain = torch.autograd.grad(sum_over_batches(batches, rows)[0], rows)
    loss, sums = sum_over_batches(batches, rows, **weighted(mode))
    weights = [None if s.is_expert else weights_of(s, row, mode) for s, row in zip(samples, rows)]
    for actual, gradient, weight in zip(torch.autograd.grad(loss, rows), plain, weights):
        if weight is None:
            assert torch.equal(actual, gradient)
        else:
            torch.testing.assert_close(actual, weight * gradient, rtol=1e-14, atol=0.0)
    assert 0 < sums["importance_clipped"] < 16  # some weights were changed, not all


@pytest.mark.parametrize("off_policy", [False, True])
def test_without_a_mode_the_sampler_does_not_matter(off_policy: bool):
    """Bitwise: nothing that the sampler recorded reaches the loss."""
    samples = make_samples(off_policy=off_policy, with_ref=True)
    others = [
        dataclasses.replace(s, rollout_log_probs=None if s.is_expert else s.rollout_log_probs - 5.0) for s in samples
    ]
    rows = make_log_probs(samples)
    loss, other = (sum_over_batches([one_rank(each)], rows, beta=0.1, use_phi=True)[0] for each in (samples, others))
    assert torch.equal(loss, other)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, rows), torch.autograd.grad(other, rows)))


@pytest.mark.parametrize("mode", MODES)
def test_a_sampler_that_agrees_changes_nothing(mode: str):
    """Bitwise: every weight is exactly 1."""
    samples = [
        dataclasses.replace(sample, rollout_log_probs=sample.old_log_probs)
        for sample in make_samples(off_policy=True, with_ref=True)
    ]
    rows = make_log_probs(samples)
    plain, _ = sum_over_batches([one_rank(samples)], rows, beta=0.1)
    loss, sums = sum_over_batches([one_rank(samples)], rows, beta=0.1, **weighted(mode))
    assert torch.equal(loss, plain)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, rows), torch.autograd.grad(plain, rows)))
    names = ("importance_ratio", "importance_ratio_squared", "importance_clipped")
    assert [sums[name] for name in names] == [16, 16, 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_loss_and_metrics_do_not_depend_on_the_split(mode: str, dp_size: int, micro_batch_size: int):
    samples = make_samples(off_policy=True, with_ref=True)
    rows = make_log_probs(samples)
    whole, whole_sums = sum_over_batches([one_rank(samples)], rows, beta=0.1, **weighted(mode))
    parts = [
        one_rank(
            samples,
            BatchLayout(dp_rank=rank, dp_size=dp_size, pad_to_multiple=4, micro_batch_multiple=2),
            micro_batch_size=micro_batch_size,
            shuffle_seed=5,
        )
        for rank in range(dp_size)
    ]
    loss, sums = sum_over_batches(parts, rows, beta=0.1, **weighted(mode))
    torch.testing.assert_close(loss, whole, **FP64_SUM)
    assert sums == pytest.approx(whole_sums, rel=1e-14, abs=1e-13)
    for actual, wanted in zip(torch.autograd.grad(loss, rows), torch.autograd.grad(whole, rows)):
        torch.testing.assert_close(actual, wanted, **FP64_SUM)


HOLES = (math.nan, math.inf, -math.inf)


def with_holes(samples: list[TrainingSample], fill: list[Tensor] | None = None) -> list[TrainingSample]:
    """Every third response token without a log-prob of the sampler's; with `fill`, with that one, which agrees."""
    holed = []
    for index, sample in enumerate(samples):
        if not sample.is_expert:
            row = sample.rollout_log_probs.clone()
            for place in range(len(row) - 1, int(sample.loss_mask.int().argmax()) - 1, -3):
                row[place] = HOLES[place % 3] if fill is None else fill[index][place]
            sample = dataclasses.replace(sample, rollout_log_probs=row)
        holed.append(sample)
    return holed


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_token_that_the_sampler_has_no_number_for_counts_as_one_that_agrees(mode: str | None):
    """Bitwise in loss and gradient, token and sequence ratios alike; and it is counted, not compared."""
    samples = make_samples(off_policy=True, with_ref=True)
    rows = make_log_probs(samples)
    agreeing = with_holes(samples, fill=[sample.old_log_probs for sample in samples])
    loss, sums = sum_over_batches([one_rank(with_holes(samples))], rows, beta=0.1, **weighted(mode))
    wanted, wanted_sums = sum_over_batches([one_rank(agreeing)], rows, beta=0.1, **weighted(mode))
    assert torch.equal(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, rows), torch.autograd.grad(wanted, rows)))
    assert sums["non_finite_rollout_log_probs"] == 7 and wanted_sums["non_finite_rollout_log_probs"] == 0
    assert sums["importance_clipped"] == wanted_sums["importance_clipped"]
    assert sums["importance_ratio"] == pytest.approx(wanted_sums["importance_ratio"] - 7, rel=1e-15)


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_what_has_no_number_is_counted_alike_however_the_step_is_split(mode: str | None, dp_size: int):
    samples = with_holes(make_samples(off_policy=False))
    rows = make_log_probs(samples)
    whole, wanted = totals_over_batches([one_rank(samples)], rows, **weighted(mode))
    parts = [
        one_rank(samples, BatchLayout(dp_rank=rank, dp_size=dp_size, pad_to_multiple=4), micro_batch_size=1)
        for rank in range(dp_size)
    ]
    loss, totals = totals_over_batches(parts, rows, **weighted(mode))
    torch.testing.assert_close(loss, whole, **FP64_SUM)
    assert totals.sums == pytest.approx(wanted.sums, rel=1e-14, abs=1e-13)
    assert totals.sums["non_finite_rollout_log_probs"] == 7.0 and totals.maxima == wanted.maxima


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_rollout_stream_contributes_zero_and_stays_attached(mode: str):
    expert_only = [sample for sample in make_samples(off_policy=False) if sample.is_expert]
    for batch in (pack([], [], [], pad_to_multiple=4), one_rank(expert_only).micro_batches[0]):
        log_probs = torch.full(batch.input_ids.shape, -0.5, requires_grad=True)
        objective = make_objective(**weighted(mode))
        loss, sums, *_ = chord_loss(log_probs, torch.ones_like(log_probs), batch, objective=objective, mu=0.0)
        loss.backward()
        assert loss.item() == 0.0 and torch.equal(log_probs.grad, torch.zeros_like(log_probs))
        names = ("importance_ratio", "importance_ratio_squared", "importance_clipped")
        assert [sums[name].item() for name in names] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("sampled", [-1e4, 0.0])
def test_an_absurd_sampler_leaves_everything_finite(mode: str | None, sampled: float):
    samples = [
        dataclasses.replace(s, rollout_log_probs=None if s.is_expert else torch.full_like(s.rollout_log_probs, sampled))
        for s in make_samples(off_policy=True)
    ]
    samples[0] = dataclasses.replace(samples[0], old_log_probs=samples[0].old_log_probs - 1e3)
    rows = [row.detach().float() for row in make_log_probs(samples)]
    rows[0] -= 1e3
    rows = [row.requires_grad_() for row in rows]
    loss, sums = sum_over_batches([one_rank(samples)], rows, **weighted(mode))
    assert loss.isfinite() and all(map(math.isfinite, sums.values()))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, rows))


# --- metrics --------------------------------------------------------------------------------------------------------


def metrics_of(
    ratios: list[float], mode: str | None, threshold: float = 1.5, sampled: list[float] | None = None
) -> dict[str, Any]:
    """The metrics of one completion with these ratios, its prompt being one token."""
    log_ratios = torch.tensor([0.0, *map(math.log, ratios)], dtype=torch.float64)
    sample = TrainingSample(
        tokens=torch.arange(len(log_ratios)),
        loss_mask=torch.arange(len(log_ratios)) > 0,
        is_expert=False,
        temperature=1.0,
        advantage=1.0,
        rollout_log_probs=torch.tensor([0.0, *(sampled or [-2.0] * len(ratios))]),
    )
    batch = one_rank([sample], BatchLayout(pad_to_multiple=4))
    importance = None if mode is None else ImportanceCorrection(mode, threshold)
    _, totals = totals_over_batches([batch], [(log_ratios - 2).requires_grad_()], importance=importance)
    return loss_metrics(totals, batch, make_objective(importance=importance), mu=0.0)


def test_metrics_by_hand():
    metrics = metrics_of([0.5, 1.0, 4.0, 0.5], mode=None)
    assert metrics["importance_weight_mean"] == pytest.approx(1.5, rel=1e-15)
    assert metrics["effective_sample_size"] == pytest.approx(6**2 / (4 * 17.5), rel=1e-15)
    assert metrics["importance_clipped_fraction"] is None


@pytest.mark.parametrize(
    ("mode", "share"),
    [("token_truncate", 0.25), ("token_mask", 0.25), ("sequence_truncate", 0.0), ("sequence_mask", 0.0)],
)
def test_a_mode_adds_its_share_and_leaves_the_others(mode: str, share: float):
    ratios = [0.5, 1.0, 4.0, 0.5]  # their geometric mean is 1
    plain, metrics = metrics_of(ratios, mode=None), metrics_of(ratios, mode=mode)
    assert metrics["importance_clipped_fraction"] == share
    for name in ("importance_weight_mean", "effective_sample_size"):
        assert metrics[name] == plain[name]
    # A completion with the mean 2 is truncated or masked as a whole.
    assert metrics_of([1.0, 4.0], mode)["importance_clipped_fraction"] == (1.0 if "sequence" in mode else 0.5)


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("mode", [None, *MODES])
def test_metrics_leave_out_what_has_no_number(mode: str | None, hole: float):
    """As those of the other tokens by themselves, but for the share of clipped tokens, which all can be."""
    wanted = metrics_of([0.5, 1.0, 4.0, 0.5], mode)
    metrics = metrics_of([0.5, 9.0, 1.0, 4.0, 0.5], mode, sampled=[-2.0, hole, -2.0, -2.0, -2.0])
    assert metrics["non_finite_rollout_log_probs"] == 1 and wanted["non_finite_rollout_log_probs"] == 0
    for name in ("log_prob_diff_mean", "log_prob_diff_max", "importance_weight_mean", "effective_sample_size"):
        assert metrics[name] == pytest.approx(wanted[name], rel=1e-15)
    if mode is not None:
        assert metrics["importance_clipped_fraction"] == wanted["importance_clipped_fraction"] * 4 / 5


def test_a_sampler_without_any_number_is_not_compared():
    metrics = metrics_of([0.5, 2.0], "sequence_truncate", sampled=[math.nan, math.inf])
    assert metrics["non_finite_rollout_log_probs"] == metrics["num_rollout_tokens"] == 2
    for name in ("log_prob_diff_mean", "log_prob_diff_max", "importance_weight_mean", "effective_sample_size"):
        assert metrics[name] is None
    assert metrics["importance_clipped_fraction"] == 0 and math.isfinite(metrics["loss"])


def test_equal_ratios_are_a_full_sample():
    assert metrics_of([1.0] * 7, mode=None)["effective_sample_size"] == 1.0
    # Rounding could pass 1.
    assert all(
        0.999999 < metrics_of([r] * n, mode=None)["effective_sample_size"] <= 1 for r in (0.1, 3.3) for n in (1, 3, 11)
    )


def test_one_huge_ratio_leaves_one_effective_token():
    metrics = metrics_of([1e12, 1.0, 1.0, 1.0, 1.0], mode=None)
    assert metrics["effective_sample_size"] == pytest.approx(0.2, rel=1e-6)
    assert metrics["importance_weight_mean"] == pytest.approx(math.exp(MAX_LOG_RATIO) / 5, rel=1e-6)


def test_metrics_of_an_empty_stream_are_null():
    batch = one_rank([sample for sample in make_samples(off_policy=False) if sample.is_expert])
    samples = [sample for sample in make_samples(off_policy=False) if sample.is_expert]
    _, totals = totals_over_batches([batch], make_log_probs(samples))
    metrics = loss_metrics(totals, batch, make_objective(**weighted("token_mask")), mu=1.0)
    names = ("importance_weight_mean", "effective_sample_size", "importance_clipped_fraction")
    assert [metrics[name] for name in names] == [None, None, None]


def test_the_ratio_of_a_sequence_may_be_the_product():
    """Of two sequences: e^(0.5 + 0.25) and e^-1, against a bound of 2."""
    log_ratios = torch.tensor([0.5, 0.25, -1.0], dtype=torch.float64)
    mask, sequences = torch.tensor([True, True, True]), Sequences(torch.tensor([0, 2, 3]))
    correction = ImportanceCorrection("sequence_truncate", 2.0, "product")
    weights, is_clipped = importance_weights(log_ratios, mask, sequences, correction)
    assert weights.tolist() == pytest.approx([2.0, 2.0, math.exp(-1)])
    assert is_clipped.tolist() == [True, True, False]
