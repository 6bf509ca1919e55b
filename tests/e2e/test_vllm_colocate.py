"""vLLM inside the trainer's processes, against the embedded engine and against a fresh vLLM of the exported weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from harness import TIMEOUT_SECONDS, finish, read_metrics, start, succeeded, write_config

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm"),
]

WORKER = Path(__file__).with_name("vllm_colocate_worker.py")


@dataclass(frozen=True)
class Trained:
    """A finished run, and what its engine held at the end."""

    run: Path
    engine: dict[str, Any]


@pytest.fixture(scope="module")
def trained(vllm_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Trained]:
    """Three steps of a TP 2 trainer, by the tensor-parallel size of its engines."""
    root = tmp_path_factory.mktemp("colocate")
    config = write_config(vllm_assets, root)

    @cache
    def train(tp: int) -> Trained:
        run, found = root / f"run{tp}", root / f"engine{tp}.json"
        arguments = (
            config,
            "parallel.tensor_model_parallel_size=2",
            "train.train_iters=3",
            "train.save_steps=null",
            f"train.output_dir={run}",
            "rollout.engine=vllm",
            "rollout.vllm_mode=colocate",
            f"rollout.vllm_tensor_parallel_size={tp}",
            "rollout.sleep_level=2",
            "rollout.offload_model=true",
            "rollout.offload_optimizer=true",
        )
        # Under torchrun: vLLM's shared memory is removed by an interpreter's end, which forks do not have.
        succeeded(
            finish(start("torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER, found, *arguments))
        )
        return Trained(run, json.loads(found.read_text(encoding="utf-8")))

    return train


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_colocated_engine_follows_the_trainer(tp: int, trained: Callable[[int], Trained]):
    for line in read_metrics(trained(tp).run):
        assert line["log_prob_diff_mean"] <= 1e-4 and line["log_prob_diff_max"] <= 1e-2
    assert trained(tp).engine["settings_kept"]


@pytest.mark.slow
def test_engines_of_one_and_of_two_ranks_train_the_same(trained: Callable[[int], Trained]):
    for one, two in zip(*(read_metrics(trained(tp).run) for tp in (1, 2)), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


@pytest.mark.slow
def test_an_engine_ends_with_the_weights_that_were_exported(trained: Callable[[int], Trained], tmp_path: Path):
    fresh = tmp_path / "fresh.json"
    describe = [sys.executable, WORKER, fresh, "--fresh", trained(1).run / "hf" / "step_3"]
    subprocess.run(describe, check=True, timeout=TIMEOUT_SECONDS)
    expected = json.loads(fresh.read_text(encoding="utf-8"))
    assert len(expected["checksums"]) > 10
    assert trained(1).engine["checksums"] == expected["checksums"]
    assert trained(1).engine["tokens"] == expected["tokens"]
