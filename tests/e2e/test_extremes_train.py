"""Extremes that `validate` lets pass are trained with: a step each, in a run of its own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from harness import read_metrics, succeeded, train_here

pytestmark = pytest.mark.e2e

RUNS: dict[str, tuple[str, ...]] = {
    "smallest": (
        "train.seed=0",
        "rollout.temperature=0.01",
        "rollout.top_p=5e-324",
        "rollout.max_completion_length=1",
        "rollout.max_batch_size=1",
        "rollout.num_generations=2",
        "train.global_batch_size=2",
        "train.micro_batch_size=1",
        "chord.chord_sft_global_batch_size=1",
        "grpo.epsilon=0",
        "grpo.epsilon_high=0",
        "optimizer.lr=1e-300",
        "optimizer.adam_beta1=0",
        "optimizer.adam_beta2=0",
        "optimizer.adam_eps=1e-30",
        "optimizer.clip_grad=0",
        "model.export_bucket_megabytes=1",
        "rewards.timeout_seconds=100",
    ),
    "largest": (
        "train.seed=2147483647",
        "train.packing_order=shuffled",
        "rollout.temperature=100",
        "rollout.top_k=2147483647",
        "rollout.max_batch_size=2147483647",
        "grpo.epsilon=0.999999",
        "grpo.epsilon_high=1e30",
        "grpo.beta=1000",
        "grpo.num_iterations=2",
        "grpo.rollout_importance_sampling_mode=sequence_truncate",
        "grpo.rollout_importance_sampling_threshold=1e30",
        "chord.chord_sft_max_length=null",
        "chord.chord_mu_warmup_steps=2147483647",
        "chord.chord_mu_decay_steps=2147483647",
        "optimizer.lr=1e-3",
        "optimizer.weight_decay=999",
        "optimizer.adam_beta1=0.9999999999999999",
        "optimizer.adam_beta2=0.9999999999999999",
        "optimizer.adam_eps=1",
        "optimizer.clip_grad=1e30",
        "model.export_bucket_megabytes=2147483647",
        "rewards.timeout_seconds=1000000",
        "train.max_skipped_steps=2147483647",
        "parallel.sequence_parallel=true",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_at_the_extremes_trains(name: str, config: Path, tmp_path: Path):
    succeeded(train_here(config, "train.train_iters=2", *RUNS[name]))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1] and lines[-1]["skipped_steps"] == 0
    assert all(math.isfinite(line["loss"]) for line in lines)
