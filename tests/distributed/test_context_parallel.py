"""Sequences spread over ranks, in float64: attention, losses and their gradients are those of whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import context_parallel_worker as worker
import pytest
import torch
from forked import launch
from torch import Tensor

from chord_megatron.backend.attention import packed_attention, segments_of

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
TOLERANCE = 1e-13  # of sums of a few dozen numbers of size one
Answers = dict[str, Tensor]


@pytest.fixture(scope="module")
def alone() -> Answers:
    """What one process says."""

    def attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
        return packed_attention(query, key, value, segments_of(cu_seqlens), scale)

    return worker.everything(worker.batch_of(), attention)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def spread(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What several say together."""
    results = tmp_path_factory.mktemp("context") / "results.pt"
    launch(HERE / "context_parallel_worker.py", request.param, results, processes=request.param)
    return torch.load(results, weights_only=True)


@pytest.mark.parametrize("what", ["attention", *worker.OBJECTIVES])
def test_ranks_together_say_what_one_does(
    what: str, alone: Answers, spread: Answers, measure: Callable[[str, float], None]
) -> None:
    """Outputs, losses, metrics, rows, and all gradients."""
    compared = [key for key in alone if key.startswith(f"{what}: ")]
    assert len(compared) >= 8 and alone.keys() == spread.keys()
    for key in compared:
        error = (spread[key] - alone[key]).abs().max().item()
        measure(f"float64, {what} of sequences on several ranks from whole ones", error)
        assert error <= TOLERANCE, key


def test_the_comparison_is_not_trivial(alone: Answers) -> None:
    """Gradients are not 0; some tokens are clipped or masked, and not all."""
    tokens = sum(int(alone[f"tokens: teaching_tokens {number}"].sum()) for number in (0, 1))
    for name in worker.OBJECTIVES:
        assert all(alone[f"{name}: gradient {number}"].count_nonzero() >= 4 for number in (0, 1))
    for name, key in (
        ("GSPO", "clipped_low"),
        ("gmpo", "clipped_high"),
        ("sequence_mask", "importance_clipped"),
        ("sequence_truncate", "importance_clipped"),
        ("off-policy mask", "off_policy_masked"),
    ):
        assert 0 < sum(alone[f"{name}: {key} {number}"].item() for number in (0, 1)) < tokens, name
