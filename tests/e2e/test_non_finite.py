"""A step with a non-finite loss changes nothing on any rank, is counted, and ends the run when it repeats."""

from __future__ import annotations

import shutil
from pathlib import Path

import forked
import pytest
import torch
from harness import read_metrics, train_here, weight_bytes
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.e2e

WORKER = Path(__file__).with_name("non_finite_worker.py")


@pytest.mark.distributed
def test_all_ranks_skip_a_step_that_is_nan_on_one(config: Path, tmp_path: Path):
    """DP 2 with the distributed optimizer; rank 1 sees NaN at step 1, and again from step 3 on."""
    overrides = ("optimizer.use_distributed_optimizer=true", "train.save_steps=1", "train.max_skipped_steps=2")
    outcome = forked.run(WORKER, config, *overrides, processes=2, env={"NON_FINITE": "1:1,3,4,5"})
    assert outcome.code == 2
    assert outcome.errors == [
        "error: stopped after 2 steps in a row with a non-finite loss or gradient norm; "
        "lower optimizer.lr, or look at the last completions in completions.jsonl"
    ]
    run = tmp_path / "run"
    assert [line["skipped_steps"] for line in read_metrics(run)] == [0, 1, 1, 2, 3]
    weights = [weight_bytes(run, step) for step in (1, 2, 3, 4, 5)]
    assert weights[1] == weights[0]
    assert weights[2] != weights[1]
    assert weights[2] == weights[3] == weights[4]


def test_diverged_weights_are_named(config: Path, tmp_path: Path):
    outcome = train_here(config, "optimizer.lr=1e30")
    assert outcome.code == 2
    assert outcome.errors == [
        "error: the model's logits are not finite, so the weights have diverged; "
        "lower optimizer.lr and start again, or go on from an earlier checkpoint"
    ]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0]


@pytest.mark.parametrize("distributed", ["false", "true"])
def test_a_run_that_never_steps_keeps_its_weights(distributed: str, config: Path, tmp_path: Path, assets: Path):
    """Experts alone, and weights so large that the loss is not finite from the start."""
    model = shutil.copytree(assets / "model", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], 3e38)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    mu_1 = ("chord.chord_mu_peak=1.0", "chord.chord_mu_valley=1.0")
    overrides = (f"model.path={model}", f"optimizer.use_distributed_optimizer={distributed}", *mu_1)
    outcome = train_here(config, "train.max_skipped_steps=2", *overrides)
    assert outcome.code == 2
    assert "stopped after 2 steps in a row" in outcome.errors[0]
    (exported,) = (tmp_path / "run" / "hf").iterdir()
    for name, tensor in load_file(exported / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name])

    outcome = train_here(config, "train.max_skipped_steps=3", *overrides)  # goes on, although Adam has no state yet
    assert "stopped after 3 steps in a row" in outcome.errors[0]
