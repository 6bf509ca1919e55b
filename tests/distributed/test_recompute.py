"""Recomputed activations: the gradient is what it is without, bitwise but for norms, and less is kept in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import launch
from tiny_families import TP_2, VOCAB_SIZE

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {"TP 1": (1, {}), "TP 2 + SP": (2, TP_2)}
NOTHING = "nothing"
# moe_act alone is missing: it is for TransformerEngine's grouped experts.
PARTS = {"llama": "core_attn mlp layernorm", "deepseek_v3": "core_attn mlp layernorm mla_up_proj moe shared_experts"}
WHOLE = {
    "full": {"recompute": "full"},
    "two layers at a time": {"recompute": True, "recompute_num_layers": 2},
    "three layers of four": {"recompute": True, "recompute_method": "block", "recompute_num_layers": 3},
}
WAYS = {
    model: {
        NOTHING: {"recompute": False},
        **{part: {"recompute": [part]} for part in parts.split()},
        "all parts": {"recompute": parts.split()},
        **WHOLE,
    }
    for model, parts in PARTS.items()
}
Answers = dict[tuple[str, str], list[dict[str, Any]]]  # by model and way, of each rank


@pytest.fixture(scope="module")
def answers(tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    generator = torch.Generator().manual_seed(1)
    questions = {
        "models": {model: str(tiny_models(model)) for model in WAYS},
        "ways": WAYS,
        "sequences": [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (30, 17, 2, 9)],
    }
    answers = {}
    for layout, (processes, parallel) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("recompute")
        path = folder / "questions.json"
        path.write_text(json.dumps({**questions, "parallel": parallel}), encoding="utf-8")
        launch(HERE / "recompute_worker.py", path, folder, processes=processes)
        ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]
        answers[layout] = {case: [rank[case] for rank in ranks] for case in ranks[0]}
    return answers


each_case = pytest.mark.parametrize(
    ("layout", "model", "way"),
    [(layout, model, way) for layout in LAYOUTS for model in WAYS for way in WAYS[model] if way != NOTHING],
)


@each_case
def test_the_gradient_is_the_same(layout: str, model: str, way: str, answers: dict[str, Answers]) -> None:
    # A recomputed norm adds its two terms to each other before it adds them to the residual's gradient.
    tolerance = 1e-6 if way in ("layernorm", "all parts") else 0.0
    for here, plain in zip(answers[layout][model, way], answers[layout][model, NOTHING], strict=True):
        assert here["loss"] == plain["loss"]
        assert here["completions"] == plain["completions"]
        assert any(gradient.any() for gradient in plain["gradients"])
        for gradient, wanted in zip(here["gradients"], plain["gradients"], strict=True):
            assert (gradient - wanted).abs().max() <= tolerance * wanted.abs().max()


@each_case
def test_less_is_kept(layout: str, model: str, way: str, answers: dict[str, Answers], measure: Callable) -> None:
    """But for plain attention, whose kernel keeps no more than what it is given and returns."""
    (here,), (plain,) = (answers[layout][model, name][0]["kept_bytes"] for name in (way, NOTHING))
    measure(f"kept activations, {model}, {way}", here / plain)
    assert here < plain or (model, way) == ("llama", "core_attn")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_layers_keep_least(layout: str, answers: dict[str, Answers]) -> None:
    kept = {way: answers[layout]["llama", way][0]["kept_bytes"][0] for way in WAYS["llama"]}
    assert kept["full"] < kept["three layers of four"] < kept["all parts"] < kept["mlp"] < kept[NOTHING]
