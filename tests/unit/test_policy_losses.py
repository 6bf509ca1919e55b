"""Every policy loss against numbers by hand, against its formula one token at a time in float64, and against the
numbers of the trainers that it comes from (tests/data/peer_losses.json).
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor

from chord_megatron.algorithm.aggregation import Mean
from chord_megatron.algorithm.objective import chord_loss
from chord_megatron.algorithm.policy_losses import (
    KL_ESTIMATORS,
    LOSS_TYPES,
    RATIO_LEVELS,
    ImportanceSamplingLevel,
    KLEstimator,
    LossType,
    PolicyTokens,
    parameters_of,
)
from chord_megatron.algorithm.sequences import Sequences
from chord_megatron.batching.packing import BatchLayout, build_global_batch, pack
from chord_megatron.batching.samples import most_uncertain
from chord_megatron.config import ChordConfig, GRPOConfig
from chord_megatron.ops.linear_log_probs import linear_log_probs
from chord_megatron.planning.objectives import check_objective
from chord_megatron.system.errors import UserError
from chord_megatron.training.objective import build_objective
from chord_megatron.types import GlobalBatch, MicroBatch, TrainingSample

PEERS = json.loads((Path(__file__).parents[1] / "data" / "peer_losses.json").read_text(encoding="utf-8"))
FP64_SUM = {"rtol": 0.0, "atol": 1e-13}  # a few dozen float64 terms of size one
MAX_LENGTH = 16
# What a loss type cannot do without.
NEEDED: dict[str, dict[str, Any]] = {"cispo": {"epsilon_high": 1.5}}
# Every loss type at every level of its ratio.
PAIRS = [(loss_type, level) for loss_type, row in LOSS_TYPES.items() for level in row.levels]


def grpo_config(loss_type: str = "dapo", level: str = "token", **settings: Any) -> GRPOConfig:
    config = GRPOConfig.model_validate(
        {"loss_type": loss_type, "importance_sampling_level": level, **NEEDED.get(loss_type, {}), **settings}
    )
    check_objective(config)
    return config


def mean_of(loss_type: str) -> Mean:
    return Mean(LOSS_TYPES[loss_type].aggregation, MAX_LENGTH)


# --- one token, by hand ---------------------------------------------------------------------------------------------


def one_token(loss_type: str, ratio: float, advantage: float, **settings: Any) -> tuple[float, float, str]:
    """Loss, its derivative by the log-prob, which is -1, and the bound that holds it."""
    log_probs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    tokens = PolicyTokens(
        log_probs,
        log_ratios=log_probs - log_probs.detach() + math.log(ratio),
        advantages=torch.tensor([advantage], dtype=torch.float64),
        mask=torch.tensor([True]),
        sequences=Sequences(torch.tensor([0, 1])),
    )
    loss, low, high = build_objective(grpo_config(loss_type, **settings), ChordConfig()).policy_loss(tokens)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    held = "low" * (low is not None and bool(low)) + "high" * (high is not None and bool(high))
    return loss.item(), gradient.item(), held


SIGMOID = 1 / (1 + math.exp(-0.5))  # at tau = 1 and a ratio of 1.5


@pytest.mark.parametrize(
    ("loss_type", "settings", "ratio", "advantage", "loss", "gradient", "held"),
    [
        ("dapo", {"epsilon_high": 0.28}, 1.5, 2.0, -2 * 1.28, 0.0, "high"),
        ("dapo", {"epsilon_high": 0.28}, 0.5, -2.0, 2 * 0.8, 0.0, "low"),
        ("dapo", {"epsilon_high": 0.28}, 1.5, -2.0, 3.0, 3.0, ""),
        # Two-sided: beyond delta a bad token keeps its loss and loses its gradient; a good one was held already.
        ("dapo", {"delta": 1.25}, 1.5, -2.0, 2.5, 0.0, "high"),
        ("dapo", {"delta": 1.6}, 1.5, -2.0, 3.0, 3.0, ""),
        ("dapo", {"delta": 1.25}, 1.5, 2.0, -2 * 1.2, 0.0, "high"),
        ("cispo", {"epsilon_high": 5.0}, 4.0, 2.0, 8.0, -8.0, ""),
        ("cispo", {"epsilon_high": 5.0}, 8.0, 2.0, 10.0, -10.0, "high"),  # capped, and its gradient stays
        ("cispo", {"epsilon_high": 5.0}, 8.0, -2.0, -10.0, 10.0, "high"),
        ("cispo", {"epsilon_high": 5.0}, 0.1, -2.0, -0.2, 0.2, ""),
        ("sapo", {}, 1.0, 2.0, -4.0, -2.0, ""),  # sigmoid(0) x 4, and the slope of -r A
        ("sapo", {}, 1.0, -2.0, 4 / 1.05, 2.0, ""),
        ("sapo", {}, 1.5, 2.0, -8 * SIGMOID, -8 * SIGMOID * (1 - SIGMOID) * 1.5, ""),
        ("sapo", {"tau_pos": 2.0}, 1.25, 2.0, -4 * SIGMOID, -8 * SIGMOID * (1 - SIGMOID) * 1.25, ""),
        ("gpg", {}, 7.0, 2.0, 2.0, -2.0, ""),
        ("gmpo", {}, math.exp(0.1), 2.0, -2 * math.exp(0.1), -2 * math.exp(0.1), ""),
        ("gmpo", {}, math.exp(0.3), 2.0, -2 * math.exp(0.2), 0.0, "high"),  # the bound is of the log-ratio
        ("gmpo", {}, math.exp(-0.3), -2.0, 2 * math.exp(-0.2), 0.0, "low"),
        ("gmpo", {}, math.exp(0.3), -2.0, 2 * math.exp(0.3), 2 * math.exp(0.3), ""),
        ("vespo", {}, 1.0, 2.0, 2.0, -2.0, ""),
        ("vespo", {}, 2.0, 2.0, 2 * 4 * math.exp(-3), -2 * 4 * math.exp(-3), ""),  # e^3 2^2 e^-6
        ("vespo", {}, 2.0, -2.0, -2 * 8 * math.exp(-2), 2 * 8 * math.exp(-2), ""),  # e^2 2^3 e^-4
        ("vespo", {"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5}, 2.0, 2.0, 4 * math.exp(-0.5), -4 * math.exp(-0.5), ""),
    ],
)
def test_a_token_by_hand(
    loss_type: str, settings: dict[str, Any], ratio: float, advantage: float, loss: float, gradient: float, held: str
):
    actual = one_token(loss_type, ratio, advantage, **settings)
    assert actual[:2] == pytest.approx((loss, gradient), abs=1e-14) and actual[2] == held


@pytest.mark.parametrize("advantage", [-2.0, -0.25, 0.0, 1.5])
@pytest.mark.parametrize("ratio", [0.01, 0.79, 0.9, 1.0, 1.3, 2.9, 3.1, 50.0])
def test_delta_is_the_dual_clip(ratio: float, advantage: float):
    """max(-r A, -clip(r) A), and where A < 0 at most -c A (arXiv 1912.09729; `clip_ratio_c` of verl)."""
    clipped = max(-ratio * advantage, -min(max(ratio, 0.8), 1.28) * advantage)
    wanted = min(clipped, -3.0 * advantage) if advantage < 0 else clipped
    assert one_token("dapo", ratio, advantage, epsilon_high=0.28, delta=3.0)[0] == pytest.approx(wanted, rel=1e-14)


def test_kl_estimators_by_hand():
    log_probs = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-0.5, -1.0, -2.0], dtype=torch.float64)
    wanted = {
        "k1": ([-0.5, 0.0, 1.0], [1.0, 1.0, 1.0]),
        "k2": ([0.125, 0.0, 0.5], [-0.5, 0.0, 1.0]),
        "k3": ([math.exp(0.5) - 1.5, 0.0, math.exp(-1)], [1 - math.exp(0.5), 0.0, 1 - math.exp(-1)]),
    }
    assert set(wanted) == set(KL_ESTIMATORS)
    for name, (values, slopes) in wanted.items():
        estimate = KL_ESTIMATORS[name](log_probs, ref)
        (gradient,) = torch.autograd.grad(estimate.sum(), log_probs)
        assert estimate.tolist() == pytest.approx(values, abs=1e-15), name
        assert gradient.tolist() == pytest.approx(slopes, abs=1e-15), name


def test_the_tables_hold_every_name():
    assert set(LOSS_TYPES) == set(get_args(LossType))
    assert set(RATIO_LEVELS) == set(get_args(ImportanceSamplingLevel))
    assert set(KL_ESTIMATORS) == set(get_args(KLEstimator))
    keys = {key for row in LOSS_TYPES.values() for key in parameters_of(row.surrogate)}
    assert keys <= set(GRPOConfig.model_fields)


# --- the numbers of others ------------------------------------------------------------------------------------------

GSPO = {"epsilon": 0.3, "epsilon_high": 0.4}
# Name in the file, loss type, level, settings, relative tolerance: what float32 of theirs leaves.
FROM_PEERS = [
    ("trl_cispo", "cispo", "token", {"epsilon_high": 2.0}, 1e-12),
    ("swift_cispo", "cispo", "token", {"epsilon_high": 2.0}, 1e-12),
    ("swift_sapo", "sapo", "token", {}, 1e-12),
    ("trl_sapo", "sapo", "token", {}, 1e-7),
    ("verl_sapo", "sapo", "token", {}, 1e-7),
    ("trl_gspo", "grpo", "sequence", GSPO, 1e-12),
    ("swift_gspo", "grpo", "sequence", GSPO, 1e-12),
    ("swift_gspo_token", "grpo", "sequence_token", GSPO, 1e-12),
    ("verl_gspo", "grpo", "sequence_token", GSPO, 1e-8),
    ("trl_luspo", "luspo", "sequence", {"epsilon_high": 0.28}, 1e-12),
    ("trl_vespo", "vespo", "token", {}, 1e-12),
    ("verl_vanilla_dual_clip_3_token_mean", "dapo", "token", {"epsilon_high": 0.28, "delta": 3.0}, 1e-12),
    ("verl_gpg_token_mean", "gpg", "token", {}, 1e-12),
    ("verl_geo_mean", "gmpo", "token", {"epsilon_high": 0.28}, 1e-8),
]


def test_every_loss_of_the_peers_is_compared():
    """All but verl's cispo, which has a lower bound of the ratio, too, and is another loss where that holds."""
    assert {name for name, *_ in FROM_PEERS} | {"verl_cispo_token_mean"} == set(PEERS["losses"][0]["expected"])


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("name", "loss_type", "level", "settings", "tolerance"), FROM_PEERS)
def test_loss_and_gradient_equal_the_peers(
    name: str, loss_type: str, level: str, settings: dict[str, Any], tolerance: float, number: int
):
    case = PEERS["losses"][number]
    lengths, expected = case["lens"], case["expected"][name]
    log_probs, old = (
        torch.tensor([value for row, n in zip(case[key], lengths) for value in row[:n]], dtype=torch.float64)
        for key in ("lp", "old")
    )
    log_probs.requires_grad_()
    sequences = Sequences(torch.tensor([0, *lengths]).cumsum(0))
    mask = torch.ones(len(log_probs), dtype=torch.bool)
    advantages = torch.tensor(case["adv"], dtype=torch.float64).repeat_interleave(torch.tensor(lengths))
    objective = build_objective(grpo_config(loss_type, level, **settings), ChordConfig())
    log_ratios = objective.ratio_level(log_probs, old, mask, sequences)
    losses = objective.policy_loss(PolicyTokens(log_probs, log_ratios, advantages, mask, sequences)).loss
    weights = aggregation_weights_of(loss_type, lengths)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), log_probs)
    assert (losses * weights).sum().item() == pytest.approx(expected["loss"], rel=tolerance)
    if loss_type == "vespo":
        # The file's gradient goes through the weight, too (it is -A (phi + lp sum phi') / n to 1e-15): it was recorded
        # without the no_grad decorator of TRL's get_gamma_weights. The right one is in the tests around this one.
        return
    wanted = [value for row, n in zip(expected["grad"], lengths) for value in row[:n]]
    assert gradient.tolist() == pytest.approx(wanted, rel=max(tolerance, 2e-7), abs=1e-9)


def aggregation_weights_of(loss_type: str, lengths: list[int]) -> Tensor:
    weight = {
        "token_mean": lambda n: 1 / sum(lengths),
        "sequence_mean": lambda n: 1 / (len(lengths) * n),
        "sequence_sum": lambda n: 1 / len(lengths),
    }[LOSS_TYPES[loss_type].aggregation]
    return torch.tensor([weight(n) for n in lengths for _ in range(n)], dtype=torch.float64)


# --- a step, one token at a time ------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A completion of the definition below: log-probs [tokens] float64, the first of them with gradient."""

    log_probs: Tensor
    old: Tensor
    sampled: Tensor
    ref: Tensor
    entropy: Tensor
    advantage: float


def make_samples() -> list[TrainingSample]:
    """Completions of 2, 4, 8 and 2 tokens, one that is filtered out and one expert answer.

    16 tokens of 4 sequences make every float32 weight exact, so that the comparison with float64 is tight.
    """
    generator = torch.Generator().manual_seed(7)
    samples = []
    shapes = [(3, 2, 0.75), (1, 4, -1.5), (2, 3, None), (2, 8, -0.5), (4, 3, 0.25), (5, 2, 1.25)]
    for prompt, answer, advantage in shapes:
        length = prompt + answer
        is_expert, is_filtered = advantage is None, prompt == 4

        def draw(length=length) -> Tensor:
            return -0.3 - 0.9 * torch.rand(length, generator=generator)

        samples.append(
            TrainingSample(
                tokens=torch.randint(0, 50, (length,), generator=generator),
                loss_mask=(torch.arange(length) >= prompt) & (not is_filtered),
                is_expert=is_expert,
                temperature=1.0,
                advantage=advantage or 0.0,
                rollout_log_probs=None if is_expert else draw(),
                old_log_probs=None if is_expert else draw(),
                ref_log_probs=None if is_expert else draw(),
            )
        )
    return samples


def make_rows(samples: list[TrainingSample]) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs and entropies of each sample [length]; the first of each is never predicted."""
    generator = torch.Generator().manual_seed(11)

    def draw(length: int) -> Tensor:
        return torch.rand(length, generator=generator, dtype=torch.float64)

    lengths = [len(sample.tokens) for sample in samples]
    return [(-0.3 - 0.9 * draw(n)).requires_grad_() for n in lengths], [draw(n).requires_grad_() for n in lengths]


def rows_of(samples: list[TrainingSample], log_probs: list[Tensor], entropies: list[Tensor]) -> list[Row]:
    rows = []
    for sample, values, entropy in zip(samples, log_probs, entropies):
        keep = sample.loss_mask
        if not sample.is_expert and keep.any():
            fixed = (sample.old_log_probs, sample.rollout_log_probs, sample.ref_log_probs)
            old, sampled, ref = (row.double()[keep] for row in fixed)
            rows.append(Row(values[keep], old, sampled, ref, entropy[keep], sample.advantage))
    return rows


def naive_ratios(row: Row, level: str) -> list[Tensor]:
    ratios = [torch.exp(a - b) for a, b in zip(row.log_probs, row.old)]
    if level == "token":
        return ratios
    product = torch.ones((), dtype=torch.float64)
    for ratio in ratios:
        product = product * ratio
    geometric = product ** (1 / len(ratios))
    if level == "sequence":
        return [geometric] * len(ratios)
    return [geometric.detach() * ratio / ratio.detach() for ratio in ratios]


def naive_token_losses(row: Row, loss_type: str, level: str, delta: float | None) -> list[Tensor]:
    """From the papers' formulas; A is one number."""
    advantage, ratios = row.advantage, naive_ratios(row, level)
    if loss_type == "gpg":
        return [-advantage * lp for lp in row.log_probs]
    if loss_type == "cispo":
        return [-advantage * min(r.item(), 1.5) * lp for r, lp in zip(ratios, row.log_probs)]
    if loss_type == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        return [-advantage * 4 / tau / (1 + torch.exp(-tau * (r - 1))) for r in ratios]
    if loss_type == "vespo":
        w = math.prod(r.item() for r in ratios)
        k, decay = (2, 3) if advantage >= 0 else (3, 2)
        return [-(w**k) * math.exp(decay - decay * w) * advantage * lp for lp in row.log_probs]
    if loss_type == "gmpo":
        bounds = [r.detach().clamp(math.exp(-0.2), math.exp(0.28)) for r in ratios]
        held = [min(r, bound) if advantage > 0 else max(r, bound) for r, bound in zip(ratios, bounds)]
        return [-advantage * torch.stack(held).prod() ** (1 / len(held))] * len(held)
    losses = []
    for ratio in ratios:
        clipped = min(max(ratio, ratio.new_tensor(0.8)), ratio.new_tensor(1.28))
        free = ratio if delta is None else min(ratio, ratio.new_tensor(delta))
        losses.append(max(-free * advantage, -clipped * advantage))
    return losses


def naive_loss(rows: list[Row], loss_type: str, level: str, grpo: GRPOConfig) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    num_tokens = sum(len(row.log_probs) for row in rows)
    for row in rows:
        length = len(row.log_probs)
        weight = {
            "token_mean": 1 / num_tokens,
            "sequence_mean": 1 / (len(rows) * length),
            "sequence_sum": 1 / len(rows),
            "fixed_length": 1 / (len(rows) * MAX_LENGTH),
        }[LOSS_TYPES[loss_type].aggregation]
        drift = sum((row.sampled - row.log_probs).tolist()) / length
        limit = grpo.off_policy_sequence_mask_delta
        is_off = limit is not None and row.advantage < 0 and drift > limit
        for loss, lp, ref, entropy in zip(
            naive_token_losses(row, loss_type, level, grpo.delta), row.log_probs, row.ref, row.entropy
        ):
            d = ref - lp
            kl = {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - d - 1}[grpo.kl_estimator]
            loss = 0.0 * loss if is_off else loss
            total = total + weight * (loss + (0 if grpo.kl_in_reward else grpo.beta * kl) - grpo.entropy_coef * entropy)
    return total


def place(batch: MicroBatch, rows: list[Tensor], outside: float = -0.4) -> Tensor:
    filler = torch.full((1,), outside, dtype=torch.float64)
    parts = [part for index in batch.sample_indices for part in (rows[index][1:], filler)]
    return torch.cat([*parts, filler.expand(len(batch.input_ids) - batch.num_tokens)])


def step_loss(
    batches: list[GlobalBatch], rows: list[Tensor], entropies: list[Tensor], grpo: GRPOConfig
) -> tuple[Tensor, dict[str, float]]:
    objective = build_objective(grpo, ChordConfig())
    results = [
        chord_loss(place(batch, rows), place(batch, entropies, math.nan), batch, objective=objective, mu=0.0)
        for of_rank in batches
        for batch in of_rank.micro_batches
    ]
    sums = {name: sum(result.sums[name].item() for result in results) for name in results[0].sums}
    return torch.stack([result.loss for result in results]).sum(), sums


def one_rank(samples: list[TrainingSample], loss_type: str, **settings: Any) -> GlobalBatch:
    layout = BatchLayout(pad_to_multiple=8)
    return build_global_batch(samples, layout, micro_batch_size=100, rollout_mean=mean_of(loss_type), **settings)


def gradients(loss: Tensor, *rows: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, rows, allow_unused=True, materialize_grads=True))


BOUNDS = {"epsilon_high": 0.28}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.1},
    {"beta": 0.1, "kl_estimator": "k1", "entropy_coef": 0.3},
    {"beta": 0.2, "kl_estimator": "k2", "off_policy_sequence_mask_delta": 0.05},
    {"beta": 0.2, "kl_in_reward": True},
]


def settings_of(loss_type: str, settings: dict[str, Any]) -> dict[str, Any]:
    reads = parameters_of(LOSS_TYPES[loss_type].surrogate)
    return {**(BOUNDS if "epsilon" in reads else {}), **settings}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("loss_type", "level"), PAIRS)
def test_the_loss_of_a_step_equals_its_formula(loss_type: str, level: str, settings: dict[str, Any]):
    grpo = grpo_config(loss_type, level, **settings_of(loss_type, settings))
    samples = make_samples()
    rows, entropies = make_rows(samples)
    expected = naive_loss(rows_of(samples, rows, entropies), loss_type, level, grpo)
    loss, _ = step_loss([one_rank(samples, loss_type)], rows, entropies, grpo)
    torch.testing.assert_close(loss, expected, **FP64_SUM)
    for actual, wanted in zip(gradients(loss, *rows, *entropies), gradients(expected, *rows, *entropies)):
        torch.testing.assert_close(actual, wanted, **FP64_SUM)


@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_a_delta_within_the_ratios_equals_its_formula(level: str):
    grpo = grpo_config("dapo", level, epsilon=0.05, epsilon_high=0.06, delta=1.07)
    samples = make_samples()
    rows, entropies = make_rows(samples)
    naive = [(row, ratio) for row in rows_of(samples, rows, entropies) for ratio in naive_ratios(row, level)]
    expected = sum(
        max(-min(r, r.new_tensor(1.07)) * row.advantage, -r.clamp(0.95, 1.06) * row.advantage) for row, r in naive
    )
    loss, sums = step_loss([one_rank(samples, "dapo")], rows, entropies, grpo)
    torch.testing.assert_close(loss, expected / 16, **FP64_SUM)
    for actual, wanted in zip(gradients(loss, *rows), gradients(expected / 16, *rows)):
        torch.testing.assert_close(actual, wanted, **FP64_SUM)
    high = [r > 1.06 if row.advantage > 0 else r > 1.07 for row, r in naive]
    assert sums["clipped_high"] == sum(map(bool, high)) > 0
    assert sums["clipped_low"] == sum(bool(row.advantage < 0 and r < 0.95) for row, r in naive)


def test_the_comparison_reaches_every_branch():
    """The samples hold ratios beyond all bounds on both signs, and a sequence that is masked and one that is not."""
    samples = make_samples()
    rows, entropies = make_rows(samples)
    seen = set()
    for row in rows_of(samples, rows, entropies):
        for ratio in naive_ratios(row, "token"):
            seen |= {(row.advantage > 0, bound) for bound in (1.28, 1.5) if ratio > bound}
            seen |= {(row.advantage > 0, 0.8)} if ratio < 0.8 else set()
    assert seen == {(good, bound) for good in (True, False) for bound in (0.8, 1.28, 1.5)}
    bad = [row for row in rows_of(samples, rows, entropies) if row.advantage < 0]
    assert {bool((row.sampled - row.log_probs).mean() > 0.05) for row in bad} == {True, False}


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 4), (2, 1), (2, 2)])
@pytest.mark.parametrize(("loss_type", "level"), PAIRS)
def test_the_loss_does_not_depend_on_the_split(loss_type: str, level: str, dp_size: int, micro_batch_size: int):
    settings = {"beta": 0.1, "entropy_coef": 0.3, "off_policy_sequence_mask_delta": 0.05}
    grpo = grpo_config(loss_type, level, **settings_of(loss_type, settings))
    samples = make_samples()
    rows, entropies = make_rows(samples)
    whole, whole_sums = step_loss([one_rank(samples, loss_type)], rows, entropies, grpo)
    parts = [
        build_global_batch(
            samples,
            BatchLayout(dp_rank=rank, dp_size=dp_size, pad_to_multiple=4, micro_batch_multiple=2),
            micro_batch_size=micro_batch_size,
            shuffle_seed=5,
            rollout_mean=mean_of(loss_type),
        )
        for rank in range(dp_size)
    ]
    loss, sums = step_loss(parts, rows, entropies, grpo)
    torch.testing.assert_close(loss, whole, **FP64_SUM)
    assert sums == pytest.approx(whole_sums, rel=1e-13, abs=1e-13)
    for actual, wanted in zip(gradients(loss, *rows), gradients(whole, *rows)):
        torch.testing.assert_close(actual, wanted, **FP64_SUM)


# Through which of its inputs a surrogate has its gradient.
BY_LOG_PROBS = ("cispo", "gpg", "vespo")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradcheck(loss_type: str):
    """Numerical derivatives, away from the bounds. What is stopped stays fixed meanwhile."""
    generator = torch.Generator().manual_seed(3)
    log_probs = -1 - torch.rand(9, generator=generator, dtype=torch.float64)
    log_ratios = torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5, 0.0, 0.3, -0.3, 0.05], dtype=torch.float64)
    mask = torch.tensor([True] * 5 + [False] + [True] * 3)
    advantages = torch.tensor([1.5] * 5 + [0.0] + [-0.75] * 3, dtype=torch.float64)
    sequences = Sequences(torch.tensor([0, 6, 9]))
    level = LOSS_TYPES[loss_type].levels[0]
    loss = build_objective(grpo_config(loss_type, level), ChordConfig()).policy_loss

    def losses(values: Tensor) -> Tensor:
        given = (values, log_ratios) if loss_type in BY_LOG_PROBS else (log_probs, values)
        return loss(PolicyTokens(*given, advantages, mask, sequences)).loss

    values = (log_probs if loss_type in BY_LOG_PROBS else log_ratios).clone().requires_grad_()
    assert torch.autograd.gradcheck(losses, values)


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_gradcheck_of_the_levels(name: str):
    generator = torch.Generator().manual_seed(3)
    log_probs = (-1 - torch.rand(9, generator=generator, dtype=torch.float64)).requires_grad_()
    mask = torch.tensor([False, True, True, True, False, True, False, True, False])
    old = torch.where(mask, -1.5, log_probs.detach())
    sequences = Sequences(torch.tensor([0, 4, 7, 8, 9]))
    assert torch.autograd.gradcheck(lambda values: RATIO_LEVELS[name](values, old, mask, sequences), log_probs)


def test_levels_by_hand():
    """Completions of 2 and 3 tokens among prompts and padding."""
    mask = torch.tensor([False, True, True, False, True, True, True, False])
    nothing = 1e3
    ratios = torch.tensor([nothing, 4, 1, nothing, 0.5, 2, 8, nothing], dtype=torch.float64)
    log_probs = torch.full((8,), -2.0, dtype=torch.float64, requires_grad=True)
    old = torch.where(mask, -2 - ratios.log(), 1e4)
    sequences = Sequences(torch.tensor([0, 3, 7, 8], dtype=torch.int32))
    wanted = {"token": [4, 1, 0.5, 2, 8], "sequence": [2, 2, 2, 2, 2], "sequence_token": [2, 2, 2, 2, 2]}
    slopes = {"token": [1] * 5, "sequence": [1] * 5, "sequence_token": [1] * 5}
    for name, values in wanted.items():
        level = RATIO_LEVELS[name](log_probs, old, mask, sequences)
        assert level.exp()[mask].tolist() == pytest.approx(values, rel=1e-14)
        assert not level[~mask].any()
        (gradient,) = torch.autograd.grad(level.sum(), log_probs, retain_graph=True)
        assert gradient[mask].tolist() == pytest.approx(slopes[name], rel=1e-14) and not gradient[~mask].any()
        # What one token's ratio owes to each: all of it its own, or a share of its sequence's.
        (of_one,) = torch.autograd.grad(level[4], log_probs)
        share = [0, 0, 1 / 3, 1 / 3, 1 / 3] if name == "sequence" else [0, 0, 1, 0, 0]
        assert of_one[mask].tolist() == pytest.approx(share, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RATIO_LEVELS)
def test_a_sequence_has_the_same_bits_beside_others(name: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 7, 50, 301]
    rows = [-torch.rand(n, generator=generator, dtype=dtype) for n in lengths]
    olds = [-torch.rand(n, generator=generator, dtype=dtype) for n in lengths]
    masks = [torch.rand(n, generator=generator) < 0.7 for n in lengths]

    def levels(order: list[int]) -> dict[int, Tensor]:
        sizes = [lengths[i] for i in order]
        packed = (torch.cat([of[i] for i in order]) for of in (rows, olds, masks))
        values = RATIO_LEVELS[name](*packed, Sequences(torch.tensor([0, *sizes]).cumsum(0)))
        return dict(zip(order, values.split(sizes)))

    alone = {i: levels([i])[i] for i in range(len(rows))}
    for index, values in levels([4, 0, 2, 3, 1]).items():
        assert torch.equal(values, alone[index])


# --- nothing to learn from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss_type", "level"), PAIRS)
def test_nothing_to_learn_from_is_zero_and_attached(loss_type: str, level: str):
    """A micro-batch of padding, rows without a loss token, and advantages that are all zero."""
    settings = settings_of(loss_type, {"off_policy_sequence_mask_delta": 0.0})
    objective = build_objective(grpo_config(loss_type, level, **settings), ChordConfig())
    samples = [dataclasses.replace(sample, advantage=0.0) for sample in make_samples()]
    masked = [dataclasses.replace(s, loss_mask=torch.zeros(len(s.tokens), dtype=torch.bool)) for s in samples]
    for batch in (
        pack([], [], [], pad_to_multiple=4),
        one_rank(masked, loss_type).micro_batches[0],
        one_rank([s for s in samples if not s.is_expert], loss_type).micro_batches[0],
    ):
        log_probs = torch.linspace(-3, -0.1, len(batch.input_ids), requires_grad=True)
        entropy = torch.ones_like(log_probs)
        loss, sums, *_ = chord_loss(log_probs, entropy, batch, objective=objective, mu=0.0)
        (gradient,) = torch.autograd.grad(loss, log_probs)
        assert loss.item() == 0.0 and torch.equal(gradient, torch.zeros_like(gradient))
        assert sums["clipped_low"] == sums["clipped_high"] == 0
        assert all(value.isfinite() for value in sums.values())


@pytest.mark.parametrize(("loss_type", "level"), PAIRS)
@pytest.mark.parametrize("outside", [-1e4, 0.0])
def test_values_outside_the_mask_do_not_matter(loss_type: str, level: str, outside: float):
    settings = {"beta": 0.1, "entropy_coef": 0.1, "off_policy_sequence_mask_delta": 0.05}
    grpo = grpo_config(loss_type, level, **settings_of(loss_type, settings))
    samples = make_samples()
    batch = one_rank(samples, loss_type).micro_batches[0]
    batch = dataclasses.replace(
        batch, old_log_probs=torch.where(batch.rollout_mask, batch.old_log_probs, -1e4 - outside)
    )
    results = []
    for filler in (-0.4, outside):
        inside = place(batch, make_rows(samples)[0])
        log_probs = torch.where(batch.counts, inside, filler).float().detach().requires_grad_()
        entropy = torch.where(batch.counts, 0.5, torch.nan)
        loss = chord_loss(log_probs, entropy, batch, objective=build_objective(grpo, ChordConfig()), mu=0.3).loss
        results.append((loss.detach(), *gradients(loss, log_probs)))
        assert not results[-1][1][~batch.counts].any() and results[-1][1].isfinite().all()
    assert all(torch.equal(plain, extreme) for plain, extreme in zip(*results))


# --- masks, bonus, quantile -----------------------------------------------------------------------------------------


def test_a_sequence_off_policy_keeps_penalty_and_denominator():
    """Three completions of two tokens: the bad ones are off by 0.5 nats a token, but for what has no number."""

    def sample(advantage: float, sampled: list[float]) -> TrainingSample:
        return TrainingSample(
            tokens=torch.tensor([1, 2, 3]),
            loss_mask=torch.tensor([False, True, True]),
            is_expert=False,
            temperature=1.0,
            advantage=advantage,
            rollout_log_probs=torch.tensor([0.0, *sampled]),
            ref_log_probs=torch.tensor([0.0, -2.0, -2.0]),
        )

    rows = [torch.full((3,), -2.0, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    off, good, holed = sample(-1.0, [-2.0, -1.0]), sample(1.0, [-1.0, -1.0]), sample(-1.0, [math.nan, -1.0])
    batch = one_rank([off, good, holed], "dapo")
    for delta, kept in ((0.4, [0, 1, 0]), (0.6, [1, 1, 1]), (0.5, [1, 1, 1])):  # at the threshold it stays
        grpo = grpo_config("dapo", off_policy_sequence_mask_delta=delta, beta=0.5, kl_estimator="k1")
        loss, sums = step_loss([batch], rows, rows, grpo)
        assert sums["off_policy_masked"] == 2 * kept.count(0)
        signs = [1, -1, 1]
        wanted = [[0.0, *[(sign * keep + 0.5) / 6] * 2] for sign, keep in zip(signs, kept)]
        for gradient, row in zip(gradients(loss, *rows), wanted):
            assert gradient.tolist() == pytest.approx(row, rel=1e-6)


def test_the_entropy_bonus_through_the_head():
    """Loss and gradient of the weights, from the fused head, are those of a softmax that is written out."""
    generator = torch.Generator().manual_seed(4)
    samples = make_samples()
    batch = one_rank(samples, "dapo").micro_batches[0]
    hidden = torch.randn(len(batch.input_ids), 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(50, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    grpo = grpo_config("dapo", epsilon_high=0.28, entropy_coef=0.3)
    log_probs, entropy = linear_log_probs(hidden, weight, batch.labels, valid=batch.counts)
    loss = chord_loss(log_probs, entropy, batch, objective=build_objective(grpo, ChordConfig()), mu=0.25).loss

    everything = torch.log_softmax(hidden @ weight.T, dim=-1)
    picked = everything.gather(1, batch.labels[:, None]).squeeze(1)
    ratio = torch.exp(picked - batch.old_log_probs)
    surrogate = torch.max(-ratio * batch.advantages, -ratio.clamp(0.8, 1.28) * batch.advantages)
    bonus = 0.3 * -(everything.exp() * everything).sum(-1)
    in_rollouts = batch.rollout_weights.double()[batch.rollout_mask] @ (surrogate - bonus)[batch.rollout_mask]
    expected = 0.75 * in_rollouts - 0.25 * batch.expert_weights.double() @ picked
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(loss, weight), gradients(expected, weight), rtol=1e-10, atol=1e-12)


def test_without_a_bonus_the_entropy_has_no_gradient():
    samples = make_samples()
    rows, entropies = make_rows(samples)
    loss, _ = step_loss([one_rank(samples, "dapo")], rows, entropies, grpo_config())
    assert torch.autograd.grad(loss, entropies, allow_unused=True) == (None,) * len(entropies)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1 / 3, 0.99])
def test_the_most_uncertain_tokens_are_those_above_the_quantile_of_the_step(share: float):
    samples = [sample for sample in make_samples() if not sample.is_expert]
    generator = torch.Generator().manual_seed(5)
    entropies = [torch.rand(len(sample.tokens), generator=generator) for sample in samples]
    counted = torch.cat([row[s.loss_mask] for s, row in zip(samples, entropies)])
    threshold = torch.quantile(counted, 1 - share)
    chosen = most_uncertain(samples, entropies, share)
    for before, after, entropy in zip(samples, chosen, entropies):
        wanted = torch.where(entropy >= threshold, before.advantage, 0.0)
        assert torch.equal(after.advantage[before.loss_mask], wanted[before.loss_mask])
        assert torch.equal(after.loss_mask, before.loss_mask)  # denominators and KL penalty stay
    assert sum(int((s.advantage != 0)[s.loss_mask].sum()) for s in chosen) == int((counted >= threshold).sum())


def test_the_most_uncertain_tokens_by_hand():
    """TRL's own case: of ten tokens the top fifth are two. Tokens that do not count are no part of it."""

    def sample(mask: list[int]) -> TrainingSample:
        return TrainingSample(
            tokens=torch.arange(7),
            loss_mask=torch.tensor([0, *mask]) > 0,
            is_expert=False,
            temperature=1.0,
            advantage=2.0,
        )

    samples = [sample([1, 1, 1, 1, 1, 1]), sample([1, 1, 1, 1, 0, 0])]
    entropies = [torch.tensor([9.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), torch.tensor([9.0, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2])]
    first, second = most_uncertain(samples, entropies, 0.2)
    assert not first.advantage[1:].any()
    assert second.advantage[1:5].tolist() == [0.0, 0.0, 2.0, 2.0]
    batch = pack([first, second], [1, 0], [0.1, 0.1], pad_to_multiple=1)
    # What concerns token t + 1 stands at t, and only where the mask is on.
    assert batch.advantages.tolist() == [0.0, 0.0, 2.0, 2.0, 0.0, 0.0, 0.0, *[0.0] * 7]
    assert int(batch.rollout_mask.sum()) == 10 and batch.rollout_weights.count_nonzero() == 10


def test_nothing_is_most_uncertain_among_no_tokens():
    sample = dataclasses.replace(make_samples()[0], loss_mask=torch.zeros(5, dtype=torch.bool))
    assert most_uncertain([sample], [torch.zeros(5)], 0.5) == [sample]


# --- a loss of the user's own ---------------------------------------------------------------------------------------

COPY = """
import torch
from chord_megatron.algorithm.policy_losses import PolicyTokens, TokenLoss


def loss(tokens: PolicyTokens) -> TokenLoss:
    ratio = torch.exp(tokens.log_ratios)
    surrogate, clipped = ratio * tokens.advantages, ratio.clamp(0.8, 1.2) * tokens.advantages
    held = clipped < surrogate
    return TokenLoss(-torch.min(surrogate, clipped), held & (ratio < 1), held & (ratio > 1))
"""


def test_the_copy_of_the_documentation_has_the_same_bits(tmp_path: Path):
    assert COPY.strip() in (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    (tmp_path / "clipped.py").write_text(COPY, encoding="utf-8")
    samples = make_samples()
    rows, entropies = make_rows(samples)
    results = []
    for settings in ({}, {"policy_loss": f"{tmp_path}/clipped.py:loss"}):
        grpo = grpo_config("grpo", "sequence_token", beta=0.1, **settings)
        loss, sums = step_loss([one_rank(samples, "grpo")], rows, entropies, grpo)
        results.append((loss, sums, gradients(loss, *rows)))
    (loss, sums, slopes), (own, own_sums, own_slopes) = results
    assert torch.equal(loss, own) and sums == own_sums
    assert all(torch.equal(a, b) for a, b in zip(slopes, own_slopes))


def test_a_loss_of_ones_own_may_leave_the_bounds_out(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        COPY.replace("return TokenLoss(", "return TokenLoss(-surrogate)  #"), encoding="utf-8"
    )
    samples = make_samples()
    rows, entropies = make_rows(samples)
    grpo = grpo_config(policy_loss=f"{tmp_path}/mine.py:loss")
    loss, sums = step_loss([one_rank(samples, "dapo")], rows, entropies, grpo)
    expected = sum(-r * row.advantage for row in rows_of(samples, rows, entropies) for r in naive_ratios(row, "token"))
    torch.testing.assert_close(loss, expected / 16, **FP64_SUM)
    assert sums["clipped_low"] == sums["clipped_high"] == 0


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("tokens.log_probs", r"must return a TokenLoss, not Tensor$"),
        ("TokenLoss(tokens.log_probs.sum())", r"a loss of each token, torch.float32 \[9\], not torch.float32 \[\]$"),
        ("TokenLoss(tokens.mask)", r"a loss of each token, torch.float32 \[9\], not torch.bool \[9\]$"),
        ("TokenLoss(None)", r"a loss of each token, torch.float32 \[9\], not NoneType$"),
        ("TokenLoss(tokens.advantages)", r"returns a loss without gradient; make it of log_probs or log_ratios$"),
        (
            "TokenLoss(tokens.log_probs, tokens.advantages)",
            r"is_clipped_low and is_clipped_high as torch.bool \[9\] or None, not torch.float32 \[9\]$",
        ),
        ("TokenLoss(tokens.log_probs.log())", r"has a NaN or infinite loss or gradient on a few tokens"),
        ("TokenLoss(tokens.log_probs.abs().sqrt() + (tokens.log_ratios * 0).sqrt())", r"NaN or infinite loss or grad"),
        ("TokenLoss(tokens.log_probs / tokens.mask.sum())", r"none that are a rollout's among them; the loss must be"),
        ("TokenLoss(tokens.nothing)", r"fails: AttributeError: .* has no attribute 'nothing' \(.*/mine.py:2\)$"),
        ("exit(0)", r"fails: SystemExit: 0 \(.*/mine.py:2\)$"),
    ],
)
def test_what_is_wrong_with_a_loss_of_ones_own_is_one_sentence(body: str, sentence: str, tmp_path: Path):
    source = f"from chord_megatron.algorithm.policy_losses import TokenLoss\ndef loss(tokens): return {body}\n"
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    grpo = grpo_config(policy_loss=f"{tmp_path}/mine.py:loss")
    with pytest.raises(UserError, match=f"^grpo.policy_loss={tmp_path}/mine.py:loss .*{sentence}"):
        build_objective(grpo, ChordConfig())


def test_a_loss_of_ones_own_is_held_to_its_shapes_in_every_step(tmp_path: Path):
    """It was right on the few tokens at the start."""
    source = COPY.replace("    held", "    if len(ratio) > 9: return TokenLoss(ratio[1:])\n    held")
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    samples = make_samples()
    rows, entropies = make_rows(samples)
    batch = one_rank(samples, "dapo")
    wanted = r"must return a loss of each token, torch.float64 \[40\], not torch.float64 \[39\]$"
    with pytest.raises(UserError, match=wanted):
        step_loss([batch], rows, entropies, grpo_config(policy_loss=f"{tmp_path}/mine.py:loss"))


def test_what_a_loss_of_ones_own_raises_in_a_step_is_one_sentence(tmp_path: Path):
    source = COPY.replace("    held", "    if len(ratio) > 9: raise KeyError('late')\n    held")
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    samples = make_samples()
    rows, entropies = make_rows(samples)
    with pytest.raises(
        UserError, match=rf"^grpo.policy_loss={tmp_path}/mine.py:loss fails: KeyError: 'late' \(.*:9\)$"
    ):
        step_loss([one_rank(samples, "dapo")], rows, entropies, grpo_config(policy_loss=f"{tmp_path}/mine.py:loss"))


def test_what_a_loss_of_ones_own_changes_in_place_stays_its_own(tmp_path: Path):
    """A batch is gone over again where the gradients of its streams are compared."""
    doubled = "    tokens = tokens._replace(advantages=2 * tokens.advantages)\n    ratio ="
    in_place = "    _ = tokens.advantages.mul_(2), tokens.log_probs.zero_(), tokens.mask.zero_()\n    ratio ="
    results = []
    for name, lines in (("doubled", doubled), ("in_place", in_place)):
        (tmp_path / f"{name}.py").write_text(COPY.replace("    ratio =", lines), encoding="utf-8")
        samples = make_samples()
        rows, entropies = make_rows(samples)
        batch, grpo = one_rank(samples, "dapo"), grpo_config(policy_loss=f"{tmp_path}/{name}.py:loss", beta=0.1)
        loss, sums = step_loss([batch], rows, entropies, grpo)
        of_batch = batch.micro_batches[0]
        results.append((sums, [loss, *gradients(loss, *rows), of_batch.advantages, of_batch.rollout_mask]))
    (sums, tensors), (own_sums, own_tensors) = results
    assert sums == own_sums and all(torch.equal(a, b) for a, b in zip(tensors, own_tensors))


# --- keys that a loss does not read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss_type": "dapo", "tau_pos": 2.0}, "grpo.tau_pos=2.0 is not read by grpo.loss_type=dapo; remove it"),
        ({"loss_type": "sapo", "epsilon": 0.1}, "grpo.epsilon=0.1 is not read by grpo.loss_type=sapo; remove it"),
        (
            {"loss_type": "cispo", "epsilon_high": 5.0, "delta": 3.0},
            "grpo.delta=3.0 is not read by grpo.loss_type=cispo; remove it",
        ),
        (
            {"policy_loss": "mine.py:loss", "epsilon_high": 0.28},
            "grpo.epsilon_high=0.28 is not read by grpo.policy_loss=mine.py:loss; remove it",
        ),
        ({"policy_loss": "mine.loss"}, "grpo.policy_loss='mine.loss' must look like path.py:function"),
        (
            {"loss_type": "cispo"},
            "grpo.loss_type=cispo takes grpo.epsilon_high, now null, as the largest ratio itself; set it above 1, such "
            "as 5.0",
        ),
        (
            {"loss_type": "cispo", "epsilon_high": 0.28},
            "grpo.loss_type=cispo takes grpo.epsilon_high, now 0.28, as the largest ratio itself; set it above 1, such "
            "as 5.0",
        ),
        (
            {"delta": 1.25, "epsilon_high": 0.28},
            "grpo.delta=1.25 bounds ratios beyond the clip range and must be above 1 + grpo.epsilon_high = 1.28; raise "
            "it, or set it to null",
        ),
        (
            {"loss_type": "gmpo", "importance_sampling_level": "sequence"},
            "grpo.loss_type=gmpo does not go with grpo.importance_sampling_level=sequence; set that to token",
        ),
        (
            {"loss_type": "luspo"},
            "grpo.loss_type=luspo does not go with grpo.importance_sampling_level=token; set that to sequence or "
            "sequence_token",
        ),
        (
            {"filtered_count": "keep"},
            "grpo.filtered_count=keep is not read by grpo.overlong_filter=false; remove it",
        ),
        (
            {"rollout_importance_sampling_threshold": 3.0},
            "grpo.rollout_importance_sampling_threshold=3.0 is not read by grpo.rollout_importance_sampling_mode=null; "
            "remove it",
        ),
        (
            {"kl_in_reward": True},
            "grpo.kl_in_reward=true needs grpo.beta above 0; set it, or remove grpo.kl_in_reward",
        ),
        (
            {"kl_estimator": "k1"},
            "grpo.kl_estimator=k1 is for the KL penalty in the loss, which needs grpo.beta above 0 and "
            "grpo.kl_in_reward=false; remove it",
        ),
    ],
)
def test_a_key_that_is_not_read_or_means_something_else_is_refused(settings: dict[str, Any], sentence: str):
    with pytest.raises(UserError) as error:
        check_objective(GRPOConfig.model_validate(settings))
    assert str(error.value) == sentence
