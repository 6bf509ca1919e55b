"""vLLM inside the trainer's processes, against the embedded engine and against a fresh vLLM of the exported weights."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness import Outcome, finish, read_metrics, start, succeeded, write_config

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm"),
]

WORKER = Path(__file__).with_name("vllm_colocate_worker.py")


def on_two_ranks(worker_arguments: list[object]) -> Outcome:
    return finish(
        start(
            "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), *map(str, worker_arguments)
        )
    )


def test_a_colocated_engine_follows_the_trainer(vllm_assets: Path, tmp_path: Path):
    """TP 2 trainer; engines of TP 1 and TP 2; both train the same, and end with the weights that were exported."""
    config = write_config(vllm_assets, tmp_path)
    metrics, engines = {}, {}
    for tp in (1, 2):
        run, found = tmp_path / f"run{tp}", tmp_path / f"engine{tp}.json"
        succeeded(
            on_two_ranks(
                [
                    found,
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
                ]
            )
        )
        metrics[tp], engines[tp] = read_metrics(run), json.loads(found.read_text(encoding="utf-8"))
        for line in metrics[tp]:
            assert line["log_prob_diff_mean"] <= 1e-4 and line["log_prob_diff_max"] <= 1e-2
        assert engines[tp]["settings_kept"]
    for one, two in zip(metrics[1], metrics[2], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)

    fresh = tmp_path / "fresh.json"
    subprocess.run(
        [sys.executable, str(WORKER), str(fresh), "--fresh", str(tmp_path / "run1" / "hf" / "step_3")],
        check=True,
        timeout=240,
    )
    expected = json.loads(fresh.read_text(encoding="utf-8"))
    assert len(expected["checksums"]) > 10
    assert engines[1]["checksums"] == expected["checksums"]
    assert engines[1]["tokens"] == expected["tokens"]
