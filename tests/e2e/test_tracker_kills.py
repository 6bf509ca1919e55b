"""A run that is killed and resumed is one run in its trackers, and has each step once."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import finish, kill, start, succeeded, train_here, wait_until, write_config
from tracker_files import mlflow_history, wandb_rows, wandb_run_ids

pytestmark = [pytest.mark.attack, pytest.mark.e2e]

STEPS = [0, 1, 2, 3, 4, 5]


def test_a_killed_run_has_each_step_once(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in its sixth step, with the checkpoint of four: the fifth is taken twice."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = write_config(assets, tmp_path)
    trackers = ("tracking.report_to=[wandb,mlflow]", f"tracking.uri={tmp_path / 'mlflow'}", "train.eval_steps=2")
    process = start("chord_megatron.cli", "train", config, *trackers, env={"HOLD_AT_CALL": "6"})
    run = tmp_path / "run"
    wait_until(lambda: sent(run, "wandb") == sent(run, "mlflow") == 4, process)
    kill(process)
    assert finish(process).code == -signal.SIGKILL
    outcome = succeeded(train_here(config, *trackers))
    assert f"resuming {run} at step 4" in outcome.stdout

    assert len(wandb_run_ids(run)) == 1
    rows = wandb_rows(run)
    assert [row["_step"] for row in rows if "train/loss" in row] == STEPS
    assert mlflow_history(tmp_path / "mlflow", "train/loss") == [
        (row["_step"], row["train/loss"]) for row in rows if "train/loss" in row
    ]
    assert [step for step, _ in mlflow_history(tmp_path / "mlflow", "eval/reward_mean")] == [0, 2, 4, 6]


def sent(run: Path, name: str) -> int:
    """The last step of which a tracker was sent the loss."""
    from chord_megatron.tracking.trackers.memory import Memory

    path = run / "trackers" / f"{name}.json"
    return Memory.read(path).sent.get("train/loss", -1)
