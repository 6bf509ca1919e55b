"""Offloading around generation: the memory is really free meanwhile, and training goes on as if nothing had been."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import launch
from selection import selected
from tiny_families import EP_2, PP_2, TP_2, VOCAB_SIZE, VPP_2

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
LAYOUTS: dict[str, dict[str, Any]] = {"TP 2": TP_2, "DP 2": {}, "EP 2": EP_2, "PP 2 x VPP 2": PP_2 | VPP_2}
PAIRS = [
    ("qwen2 tied", "float32", False),
    ("qwen2 untied", "bfloat16", False),
    ("qwen2 tied", "bfloat16", True),
    ("qwen2 untied", "float32", True),
]
# Each layout, and every pair of head, dtype and optimizer.
SHORT = [
    *(("TP 2", *case) for case in PAIRS[:2]),
    *(("DP 2", *case) for case in PAIRS[2:]),
    ("EP 2", "qwen3_moe untied", "bfloat16", True),
    ("PP 2 x VPP 2", "qwen2 untied", "bfloat16", True),
]
LONG = [
    *(("TP 2", *case) for case in PAIRS[2:]),
    *(("DP 2", *case) for case in PAIRS[:2]),
    ("EP 2", "qwen3_moe untied", "bfloat16", False),
    ("PP 2 x VPP 2", "qwen2 untied", "float32", True),
]
each_case = pytest.mark.parametrize(
    "case", [*SHORT, *(pytest.param(case, marks=pytest.mark.slow) for case in LONG)], ids=lambda case: name_of(case)
)
TRAINING = {"forward_backward", "optimizer_step", "save", "load"}
EVALUATION = {"compute_log_probs", "generate", "export_hf_weights"}
# What leaves in each visit of offload_worker.py's train(), and whether Adam has moments by then.
VISITS = [(("model", "optimizer"), False), (("optimizer",), True), (("model",), True), (("model", "optimizer"), True)]
OF_MODEL, OF_OPTIMIZER = ("parameters",), ("gradients", "masters", "moments")
Case = tuple[str, str, str, bool]


def name_of(case: Case) -> str:
    layout, model, dtype, distributed_optimizer = case
    return f"{layout} {model} {dtype} {'distributed' if distributed_optimizer else 'plain'} optimizer"


@pytest.fixture(scope="module")
def answers(
    tiny_models: Callable[..., Path], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What offload_worker.py found of each selected case, in a launch of two processes for each layout."""
    folder = tmp_path_factory.mktemp("offload")
    generator = torch.Generator().manual_seed(1)
    cases: dict[str, dict[str, dict]] = {layout: {} for layout in LAYOUTS}
    for (case,) in sorted(selected(request, "case")):
        layout, model, dtype, distributed_optimizer = case
        name, head = model.split()
        # An interleaved pipeline needs a layer for each of its chunks.
        layers = 4 if "VPP" in layout else 2
        path = tiny_models(name, tied=head == "tied", dtype=dtype, num_hidden_layers=layers)
        cases[layout][name_of(case)] = {
            "path": str(path),
            "dtype": dtype,
            "distributed_optimizer": distributed_optimizer,
        }
    sequences = [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (9, 4, 12, 7)]
    answers = {}
    for layout, of_layout in cases.items():
        questions = {"parallel": LAYOUTS[layout], "cases": of_layout, "sequences": sequences}
        (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        launch(HERE / "offload_worker.py", folder / "questions.json", folder / "answers.pt", processes=2)
        answers |= torch.load(folder / "answers.pt", weights_only=True)
    return answers


@each_case
def test_training_goes_on_bitwise(case: Case, answers: dict) -> None:
    plain, offloaded = (answers[name_of(case)][run] for run in ("plain", "offloaded"))
    assert offloaded["steps"] == plain["steps"]
    assert offloaded["weights"].keys() == plain["weights"].keys()
    assert not [n for n, weight in plain["weights"].items() if not torch.equal(offloaded["weights"][n], weight)]
    losses = [loss for loss, _ in plain["steps"]]
    assert losses == sorted(losses, reverse=True)  # it learns: gradients and optimizer state are alive


@each_case
def test_offloaded_memory_is_free(case: Case, answers: dict) -> None:
    """All of it and nothing else, on each rank; and it is as much as the model's size says."""
    of_case = answers[name_of(case)]
    for rank in of_case["ranks"]:
        for visit, (parts, is_trained) in zip(rank["visits"], VISITS, strict=True):
            expected = expected_bytes(case, rank["buffers"], is_trained=is_trained)
            away = {*(OF_MODEL if "model" in parts else ()), *(OF_OPTIMIZER if "optimizer" in parts else ())}
            for use, size in expected.items():
                assert visit["before"][use] == visit["after"][use] == size
                assert visit["inside"][use] == (0 if use in away else size)


@each_case
def test_an_offloaded_engine_works_on_what_is_there_and_refuses_the_rest(case: Case, answers: dict) -> None:
    for rank in answers[name_of(case)]["ranks"]:
        for visit, (parts, _) in zip(rank["visits"], VISITS, strict=True):
            assert set(visit["refused"]) == TRAINING | (EVALUATION if "model" in parts else set())
            assert visit["is_same_inside"]
            assert visit["is_same_afterwards"]
            assert (visit["gradients_left"] == 0) == ("optimizer" in parts)


@each_case
def test_everything_is_back_when_the_body_raises(case: Case, answers: dict) -> None:
    raised = answers[name_of(case)]["raised"]
    assert raised == {"error": "KeyError('the other engine failed')", "is_back": True}


@each_case
def test_no_step_on_gradients_that_offloading_dropped(case: Case, answers: dict) -> None:
    assert "forward_backward comes first" in answers[name_of(case)]["lost_gradients"]


def expected_bytes(case: Case, buffers: list[dict[str, Any]], *, is_trained: bool) -> dict[str, int]:
    """By use, from the numbers of elements of a rank's parameters."""
    _, _, dtype, distributed_optimizer = case
    total = owned = 0
    for buffer in buffers:
        numel, shard = buffer_numel(**buffer) if distributed_optimizer else (sum(buffer["sizes"]),) * 2
        total += numel
        owned += shard
    return {
        "parameters": (4 if dtype == "float32" else 2) * total,
        "gradients": 4 * total,
        "masters": 0 if dtype == "float32" else 4 * owned,
        "moments": 8 * owned if is_trained else 0,
    }


def buffer_numel(sizes: list[int], dp_size: int, dp_rank: int) -> tuple[int, int]:
    """Elements of a distributed optimizer's buffer with its padding, and of the parameters in the rank's share of it.

    Parameters lie there last to first, each from a multiple of 64 (param_and_grad_buffer.py:650, 662).
    """
    ranges, end = [], 0
    for size in reversed(sizes):
        start = round_up(end, 64)
        end = start + size
        ranges.append((start, end))
    total = round_up(end, math.lcm(dp_size, 128))
    low, high = total * dp_rank // dp_size, total * (dp_rank + 1) // dp_size
    return total, sum(max(0, min(end, high) - max(start, low)) for start, end in ranges)


def round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple
