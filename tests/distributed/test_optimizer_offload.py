"""Steps that the host takes: as far as they can be tried without a GPU, with a stand-in for what is on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import launch
from tiny_families import EP_2, VOCAB_SIZE

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "one process": (1, "qwen2", {}),
    "EP 2": (2, "qwen3_moe", EP_2),
}


@pytest.fixture(scope="module", params=CASES)
def ranks(
    request: pytest.FixtureRequest, tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each rank found."""
    processes, model, parallel = CASES[request.param]
    folder = tmp_path_factory.mktemp("offload")
    generator = torch.Generator().manual_seed(1)
    questions = {
        "parallel": parallel,
        "model": str(tiny_models(model, dtype="bfloat16")),
        "sequences": [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (9, 4, 12, 7)],
    }
    (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    launch(HERE / "optimizer_offload_worker.py", folder / "questions.json", folder, processes=processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def test_every_step_is_taken_on_the_host(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert all(count == 1 for count in found["of_which_on_host"])


def test_the_steps_are_those_without(ranks: list[dict[str, Any]]) -> None:
    """In float32, by another implementation of Adam: rounding apart, which bfloat16 weights rarely show."""
    for found in ranks:
        pairs = [(found["offloaded"], found["plain"]), (found["from plain"], found["plain"])]
        pairs.append((found["from offloaded"], found["offloaded"]))
        for run, expected in pairs:
            torch.testing.assert_close(torch.tensor(run["last"]), torch.tensor(expected["last"]), rtol=1e-3, atol=0)
            same = [(run["weights"][name] == weight).float().mean() for name, weight in expected["weights"].items()]
            assert min(same) > 0.99


def test_a_resumed_run_is_the_undisturbed_one(ranks: list[dict[str, Any]]) -> None:
    """Bitwise."""
    for found in ranks:
        assert found["resumed"]["last"] == found["offloaded"]["last"]
        for name, weight in found["offloaded"]["weights"].items():
            assert torch.equal(found["resumed"]["weights"][name], weight), name
