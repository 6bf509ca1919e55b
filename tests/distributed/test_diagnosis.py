"""Norms and cosine of the streams' gradients: exact, the same under every layout, and without a trace in training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import launch
from selection import selected
from tiny_families import CP_2, EP_2, PP_2, TP_2, VOCAB_SIZE, make_model
from torch import Tensor
from transformers import PreTrainedModel

pytestmark = pytest.mark.distributed

HERE, MU = Path(__file__).parent, 0.3
# Tied embeddings and biases; experts with a bias of their router; experts on ranks of their own.
MODELS = {"qwen2 tied": {"tied": True}, "deepseek_v3": {}, "qwen3_moe": {}}
SHARDED = {"use_distributed_optimizer": True}
# Processes, layout, optimizer.
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP 1": (1, {}, {}),
    "TP 2 + SP": (2, TP_2, {}),
    "PP 2": (2, PP_2, {}),
    "DP 2, distributed optimizer": (2, {}, SHARDED),
    "DP 2, overlapped": (2, {}, {"overlap_grad_reduce": True}),
    "EP 2, distributed optimizer": (2, EP_2, SHARDED),
    "CP 2, distributed optimizer": (2, CP_2, SHARDED),
}
SHORT = {
    ("TP 1", "qwen2 tied"),
    ("TP 1", "deepseek_v3"),
    ("TP 1", "qwen3_moe"),
    ("TP 2 + SP", "qwen2 tied"),
    ("TP 2 + SP", "deepseek_v3"),
    ("PP 2", "qwen2 tied"),
    ("PP 2", "deepseek_v3"),
    ("DP 2, distributed optimizer", "qwen2 tied"),
    ("EP 2, distributed optimizer", "qwen3_moe"),
    ("CP 2, distributed optimizer", "qwen2 tied"),
}
CASES = [
    pytest.param(layout, model, marks=() if (layout, model) in SHORT else pytest.mark.slow)
    for layout in LAYOUTS
    for model in MODELS
    if "EP" not in layout or model != "qwen2 tied"
]
each_case = pytest.mark.parametrize(("layout", "model"), CASES)
Answers = dict[tuple[str, str], dict[str, dict[str, Any]]]  # by layout and model; "plain" and "diagnosed"


def make_samples() -> list[dict[str, Any]]:
    """Four rollouts, one of which teaches nothing, and three expert rows."""
    generator = torch.Generator().manual_seed(2)
    kinds = ((14, 5, 1.5), (9, 4, -0.5), (20, 9, -1.0), (7, 3, 0.0), (12, 4, None), (17, 6, None), (5, 2, None))
    return [
        {
            "tokens": torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist(),
            "prompt_length": prompt_length,
            "advantage": advantage,
        }
        for length, prompt_length, advantage in kinds
    ]


SAMPLES = make_samples()
EXPERTS = [sample for sample in SAMPLES if sample["advantage"] is None]


@pytest.fixture(scope="module")
def answers(
    tiny_models: Callable[..., Path], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    """What the engine says of each selected model and layout; layouts of as many processes share a launch."""
    wanted = selected(request, "layout", "model")
    wanted |= {("TP 1", model) for _, model in wanted}
    answers: Answers = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("answers")
        questions = {
            "models": {name: str(tiny_models(name.split()[0], **options)) for name, options in MODELS.items()},
            "layouts": {
                layout: (settings, optimizer, [model for model in MODELS if (layout, model) in wanted])
                for layout, (count, settings, optimizer) in LAYOUTS.items()
                if count == processes
            },
            "samples": SAMPLES,
            "mu": MU,
        }
        (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        launch(HERE / "diagnosis_worker.py", folder / "questions.json", folder / "answers.pt", processes=processes)
        answers |= torch.load(folder / "answers.pt", weights_only=True)
    return answers


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[Tensor, Tensor, list[float]]]:
    """Of each model in float64: the flat gradients of both streams, and the mean log-prob of each expert row."""
    return {name: reference(make_model(name.split()[0], **options).double()) for name, options in MODELS.items()}


def reference(model: PreTrainedModel) -> tuple[Tensor, Tensor, list[float]]:
    parameters = list(model.parameters())
    model.config._experts_implementation = "eager"  # the other one knows no float64

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, parts)])

    rollouts = [(sample["advantage"], target_log_probs(model, sample, 0.8)) for sample in SAMPLES[:4]]
    experts = [target_log_probs(model, sample, 1.0) for sample in EXPERTS]
    # On-policy the ratio is 1 and its gradient that of the log-prob.
    of_rollouts = -sum(a * row.sum() for a, row in rollouts) / sum(len(row) for _, row in rollouts)
    of_experts = -torch.cat(experts).mean()
    means = [row.mean().item() for row in experts]
    return gradient(of_rollouts), gradient(of_experts), means


def target_log_probs(model: PreTrainedModel, sample: dict[str, Any], temperature: float) -> Tensor:
    tokens = torch.tensor(sample["tokens"])
    logits = model(input_ids=tokens[None]).logits[0, :-1] / temperature
    log_probs = torch.log_softmax(logits, dim=-1).gather(1, tokens[1:, None]).squeeze(1)
    return log_probs[sample["prompt_length"] - 1 :]


@each_case
def test_norms_and_cosine_are_exact(
    layout: str,
    model: str,
    answers: Answers,
    references: dict[str, tuple[Tensor, Tensor, list[float]]],
    measure: Callable[[str, float], None],
) -> None:
    of_rollouts, of_experts, _ = references[model]
    wanted = (of_rollouts.norm().item(), of_experts.norm().item())
    wanted_cosine = torch.nn.functional.cosine_similarity(of_rollouts, of_experts, dim=0).item()
    assert abs(wanted_cosine) > 1e-3
    diagnosed = answers[layout, model]["diagnosed"]
    norm_a, norm_b, cosine = diagnosed["comparisons"][0][0]
    for name, found, expected in (("rollout", norm_a, wanted[0]), ("expert", norm_b, wanted[1])):
        measure(f"{name} gradient's norm from float64, {model}", abs(found / expected - 1))
        assert found == pytest.approx(expected, rel=1e-5)
    measure(f"cosine from float64, {model}", abs(cosine - wanted_cosine))
    assert cosine == pytest.approx(wanted_cosine, abs=1e-5)
    # The norm that training reports is that of the two, mixed.
    mixed = ((1 - MU) * of_rollouts + MU * of_experts).norm().item()
    assert diagnosed["steps"][0][2] == pytest.approx(mixed, rel=1e-5)


@each_case
def test_every_rank_and_layout_has_the_same_comparison(layout: str, model: str, answers: Answers) -> None:
    baseline = answers["TP 1", model]["diagnosed"]["comparisons"]
    comparisons = answers[layout, model]["diagnosed"]["comparisons"]
    for everyone in comparisons:
        assert len(everyone) == LAYOUTS[layout][0] and len(set(everyone)) == 1
    # Of the same weights; those of the next steps differ by rounding, which Adam's first steps enlarge.
    (first, *_), (expected,) = comparisons[0], baseline[0]
    assert first[:2] == pytest.approx(expected[:2], rel=1e-5)
    assert first[2] == pytest.approx(expected[2], abs=1e-5)


@each_case
def test_training_is_the_same_bit_for_bit(layout: str, model: str, answers: Answers) -> None:
    plain, diagnosed = answers[layout, model]["plain"], answers[layout, model]["diagnosed"]
    assert diagnosed["steps"] == plain["steps"] and diagnosed["rows"] == plain["rows"]
    assert list(diagnosed["weights"]) == list(plain["weights"])
    assert all(torch.equal(weight, plain["weights"][name]) for name, weight in diagnosed["weights"].items())
    assert diagnosed["refused"]


@each_case
def test_rows_are_those_of_each_sample(
    layout: str, model: str, answers: Answers, references: dict[str, tuple[Tensor, Tensor, list[float]]]
) -> None:
    rows = answers[layout, model]["diagnosed"]["rows"][0]
    assert {name: len(values) for name, values in rows.items()} == {"log_prob": 7, "phi": 7, "teaching_tokens": 7}
    assert rows["teaching_tokens"] == [9, 5, 11, 0, 0, 0, 0]
    lengths = [len(sample["tokens"]) - sample["prompt_length"] for sample in EXPERTS]
    means = [total / length for total, length in zip(rows["log_prob"][4:], lengths)]
    assert means == pytest.approx(references[model][2], rel=1e-5)
    assert rows["log_prob"][:4] == [0.0] * 4 == rows["phi"][:4]  # rollouts have none
    assert rows["phi"][4:] == pytest.approx(answers["TP 1", model]["diagnosed"]["rows"][0]["phi"][4:], rel=1e-4)
