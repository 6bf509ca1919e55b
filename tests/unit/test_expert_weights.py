"""Weights of expert tokens: by hand, as gradients of what they were derived from, by name, and in the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chord_megatron.algorithm.expert_weights import (
    EXPERT_WEIGHTS,
    entropy_aware,
    luffy,
    phi,
    probability,
    uniform,
)
from chord_megatron.algorithm.objective import chord_loss
from chord_megatron.batching.packing import BatchLayout, build_global_batch
from chord_megatron.config import ChordConfig, GRPOConfig
from chord_megatron.planning.experts import check_expert_weight, expert_weight_name
from chord_megatron.system.errors import UserError
from chord_megatron.training.objective import build_objective
from chord_megatron.types import TrainingSample

P = [1.0, 0.9, 0.5, 0.1, 0.01]
LOG_PROBS = torch.tensor([math.log(p) for p in P], dtype=torch.float64)
ENTROPY = torch.tensor([0.0, 0.5, math.log(2), 2.0, 5.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", [1.0] * 5),
        ("phi", [0.0, 0.09, 0.25, 0.09, 0.0099]),
        ("probability", P),
        # 0.1 p / (p + 0.1)^2
        ("luffy", [0.1 / 1.21, 0.09, 0.05 / 0.36, 0.25, 0.001 / 0.0121]),
        ("entropy", [0.5, math.exp(-0.5) / 2, 0.25, math.exp(-2) / 2, math.exp(-5) / 2]),
    ],
)
def test_by_hand(name: str, expected: list[float]):
    assert EXPERT_WEIGHTS[name](LOG_PROBS, ENTROPY).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("name", EXPERT_WEIGHTS)
def test_float32_far_from_one_and_near_it(name: str):
    """Against forty digits, where p is all but 1 and where float32 can hardly hold it."""
    log_probs = [-1e-7, -1e-3, -0.7, -5.0, -40.0, -80.0]
    entropy = [1e-6, 0.01, 0.7, 3.0, 8.0, 11.0]
    with localcontext(prec=40):
        p = [Decimal(float(torch.tensor(x))).exp() for x in log_probs]
        h = [Decimal(float(torch.tensor(x))) for x in entropy]
        gamma = Decimal("0.1")
        formulas: dict[str, Callable[[Decimal, Decimal], Decimal]] = {
            "uniform": lambda p, h: Decimal(1),
            "phi": lambda p, h: p * (1 - p),
            "probability": lambda p, h: p,
            "luffy": lambda p, h: gamma * p / (p + gamma) ** 2,
            "entropy": lambda p, h: (-h).exp() / 2,
        }
        expected = [float(formulas[name](*pair)) for pair in zip(p, h)]
    found = EXPERT_WEIGHTS[name](torch.tensor(log_probs), torch.tensor(entropy))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=2e-5)  # an ulp of log-prob 80 is 4e-6 of p


@pytest.mark.parametrize("gamma", [1e-3, 0.1, 3.0, 1e3])
def test_luffy_is_the_gradient_of_the_shaped_probability(gamma: float):
    log_probs = LOG_PROBS.clone().requires_grad_()
    p = log_probs.exp()
    (expected,) = torch.autograd.grad((p / (p + gamma)).sum(), log_probs)
    torch.testing.assert_close(luffy(LOG_PROBS, ENTROPY, gamma=gamma), expected, rtol=1e-9, atol=1e-30)


def test_luffy_stays_finite_where_nothing_else_does():
    for log_prob in (0.0, -1e-30, -200.0, -1e30):
        for gamma in (1e-30, 1e30):
            weight = luffy(torch.tensor([log_prob]), torch.tensor([0.0]), gamma=gamma)
            assert 0 <= weight.item() <= 0.25


def test_tokens_above_the_cutoff_have_the_gradient_of_a_bounded_log_prob():
    """Trinity-RFT bounds the log-prob by the cutoff's, which leaves the tokens above it without gradient."""
    cutoff = 0.5
    log_probs = LOG_PROBS.clone().requires_grad_()
    (-log_probs.clamp(max=math.log(cutoff)) * phi(log_probs, ENTROPY)).sum().backward()
    assert phi(LOG_PROBS, ENTROPY, cutoff=cutoff).tolist() == pytest.approx([0.0, 0.0, 0.25, 0.09, 0.0099], abs=1e-15)
    torch.testing.assert_close(-phi(LOG_PROBS, ENTROPY, cutoff=cutoff), log_probs.grad, rtol=0, atol=0)


@pytest.mark.parametrize("weight", [uniform, phi, probability, luffy, entropy_aware])
def test_weights_have_no_gradient(weight: Callable[[Tensor, Tensor], Tensor]):
    found = weight(LOG_PROBS.clone().requires_grad_(), ENTROPY.clone().requires_grad_())
    assert not found.requires_grad


# --- in the loss ----------------------------------------------------------------------------------------------------


def objective(**chord: Any):
    return build_objective(GRPOConfig(), ChordConfig(**chord))


def expert_gradient(**chord: Any) -> list[float]:
    """Of the loss at mu = 1 of one expert row with five answer tokens, the last two of which weigh 2 and 0."""
    sample = TrainingSample(
        tokens=torch.arange(6),
        loss_mask=torch.tensor([False, True, True, True, True, False]),
        is_expert=True,
        temperature=1.0,
        token_weights=torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0, 0.0]),
    )
    batch = build_global_batch([sample], BatchLayout(), micro_batch_size=1)
    log_probs = torch.cat([LOG_PROBS, torch.zeros(1, dtype=torch.float64)]).requires_grad_()
    entropy = torch.cat([ENTROPY, torch.zeros(1, dtype=torch.float64)])
    chord_loss(log_probs, entropy, batch.micro_batches[0], objective=objective(**chord), mu=1.0).loss.backward()
    assert batch.num_expert_tokens == 4
    return log_probs.grad.tolist()


@pytest.mark.parametrize(
    ("chord", "weights"),
    [
        ({}, [1.0] * 4),
        ({"chord_enable_phi_function": True}, [0.0, 0.09, 0.25, 0.09]),
        ({"expert_weight": "phi"}, [0.0, 0.09, 0.25, 0.09]),
        ({"chord_enable_phi_function": True, "expert_weight_cutoff": 0.6}, [0.0, 0.0, 0.25, 0.09]),
        ({"expert_weight": "probability"}, P[:4]),
        ({"expert_weight": "luffy", "luffy_gamma": 0.5}, [p * 0.5 / (p + 0.5) ** 2 for p in P[:4]]),
        ({"expert_weight": "entropy"}, [math.exp(-h) / 2 for h in ENTROPY[:4].tolist()]),
    ],
)
def test_the_gradient_of_an_expert_token_is_its_weight_over_the_tokens_of_the_step(
    chord: dict[str, Any], weights: list[float]
):
    """The data's own weights, 1, 1, 1 and 2 here, multiply and leave the four of the denominator alone."""
    expected = [-w * of_data / 4 for w, of_data in zip(weights, (1, 1, 1, 2))]
    assert expert_gradient(**chord) == pytest.approx([*expected, 0.0, 0.0], abs=1e-8)


# --- by name --------------------------------------------------------------------------------------------------------


def test_a_function_of_the_users_own(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def weigh(log_probs, entropy): return log_probs.exp() * entropy\n")
    expected = [-p * h * of_data / 4 for p, h, of_data in zip(P, ENTROPY.tolist(), (1, 1, 1, 2))]
    found = expert_gradient(expert_weight=f"{tmp_path}/mine.py:weigh")
    assert found == pytest.approx([*expected, 0.0, 0.0], abs=1e-8)


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        ("log_probs.sum()", r"must return a weight of each token, torch.float32 \[5\], not torch.float32 \[\]"),
        ("entropy[1:]", r"must return a weight of each token, torch.float32 \[5\], not torch.float32 \[4\]"),
        ("1.0", r"must return a weight of each token, torch.float32 \[5\], not float"),
        ("None", r"must return a weight of each token, torch.float32 \[5\], not NoneType"),
        ("1 / entropy", r"returns a NaN or infinite weight for one of a few tokens, of which one is certain \(p = 1\)"),
        ("log_probs.log()", r"returns a NaN or infinite weight for one of a few tokens, .*"),
        ("entropy.nothing", r"fails: AttributeError: 'Tensor' object has no attribute 'nothing' \(.*/a.py:1\)"),
        ("exit(0)", r"fails: SystemExit: 0 \(.*/a.py:1\)"),
    ],
)
def test_a_function_is_tried_before_anything_starts(result: str, sentence: str, tmp_path: Path):
    (tmp_path / "a.py").write_text(f"def f(log_probs, entropy): return {result}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"^chord.expert_weight={tmp_path}/a.py:f {sentence}$"):
        build_objective(GRPOConfig(), ChordConfig(expert_weight=f"{tmp_path}/a.py:f"))


def test_a_function_is_held_to_its_shape_in_every_step(tmp_path: Path):
    """It was right on the few tokens at the start."""
    (tmp_path / "a.py").write_text("def f(log_probs, entropy): return entropy[:5]\n", encoding="utf-8")
    weigh = build_objective(GRPOConfig(), ChordConfig(expert_weight=f"{tmp_path}/a.py:f")).expert_weight
    with pytest.raises(UserError, match=r"a weight of each token, torch.float64 \[6\], not torch.float64 \[5\]$"):
        weigh(torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64))


def test_what_a_function_raises_in_a_step_is_one_sentence(tmp_path: Path):
    (tmp_path / "a.py").write_text("def f(log_probs, entropy):\n assert len(entropy) < 6, 'six'\n return entropy\n")
    weigh = build_objective(GRPOConfig(), ChordConfig(expert_weight=f"{tmp_path}/a.py:f")).expert_weight
    with pytest.raises(
        UserError, match=rf"^chord.expert_weight={tmp_path}/a.py:f fails: AssertionError: six \(.*:2\)$"
    ):
        weigh(torch.zeros(6), torch.ones(6))


def test_what_a_function_changes_in_place_stays_its_own(tmp_path: Path):
    """The log-probs and entropies are those of the loss and of the metrics."""
    (tmp_path / "a.py").write_text("def f(log_probs, entropy): return log_probs.exp_() * entropy.neg_()\n")
    weigh = build_objective(GRPOConfig(), ChordConfig(expert_weight=f"{tmp_path}/a.py:f")).expert_weight
    log_probs, entropy = LOG_PROBS.clone(), ENTROPY.clone()
    weigh(log_probs, entropy)
    assert torch.equal(log_probs, LOG_PROBS) and torch.equal(entropy, ENTROPY)


def test_a_function_with_parameters_of_its_own_gets_no_gradient_into_the_loss(tmp_path: Path):
    source = "import torch\ndef f(log_probs, entropy): return torch.ones(5, requires_grad=True) * log_probs\n"
    (tmp_path / "a.py").write_text(source, encoding="utf-8")
    weigh = build_objective(GRPOConfig(), ChordConfig(expert_weight=f"{tmp_path}/a.py:f")).expert_weight
    assert not weigh(LOG_PROBS, ENTROPY).requires_grad


@pytest.mark.parametrize(
    ("chord", "name"),
    [
        ({}, "uniform"),
        ({"chord_enable_phi_function": True}, "phi"),
        ({"chord_enable_phi_function": True, "expert_weight": "phi"}, "phi"),
        ({"expert_weight": "luffy"}, "luffy"),
    ],
)
def test_names(chord: dict[str, Any], name: str):
    check_expert_weight(ChordConfig(**chord))
    assert expert_weight_name(ChordConfig(**chord)) == name


@pytest.mark.parametrize(
    ("chord", "sentence"),
    [
        (
            {"expert_weight": "lufy"},
            "chord.expert_weight='lufy' is unknown; use uniform, phi, probability, luffy, entropy or path.py:function; "
            "did you mean 'luffy'?",
        ),
        (
            {"expert_weight": "uniform", "chord_enable_phi_function": True},
            "chord.chord_enable_phi_function=true asks for chord.expert_weight=phi, which is 'uniform'; remove one of "
            "them",
        ),
        (
            {"expert_weight_cutoff": 0.5},
            "chord.expert_weight_cutoff=0.5 is not read by chord.expert_weight=uniform; remove it",
        ),
        (
            {"luffy_gamma": 0.2, "expert_weight": "phi"},
            "chord.luffy_gamma=0.2 is not read by chord.expert_weight=phi; remove it",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(chord: dict[str, Any], sentence: str):
    with pytest.raises(UserError) as error:
        check_expert_weight(ChordConfig(**chord))
    assert str(error.value) == sentence


def test_a_file_that_is_not_there_is_refused_before_anything_starts():
    with pytest.raises(UserError, match=r"chord.expert_weight=absent.py:f: .*absent.py does not exist; mend"):
        build_objective(GRPOConfig(), ChordConfig(expert_weight="absent.py:f"))
