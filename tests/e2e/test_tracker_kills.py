"""A run that is killed and resumed is one run in its trackers, and has each step once."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import finish, kill, read_metrics, start, succeeded, train_here, wait_until, write_config
from tracker_files import mlflow_history, wandb_rows, wandb_run_ids

pytestmark = [pytest.mark.attack, pytest.mark.e2e]

STEPS = [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_killed_run_has_each_step_once(
    name: str, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its sixth step, with the checkpoint of four: the fifth is taken twice."""
    for package in ("wandb",) if name == "wandb" else ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config, uri = write_config(assets, tmp_path), f"sqlite:///{tmp_path}/mlflow.db"
    trackers = (f"tracking.report_to=[{name}]", f"tracking.uri={uri}")
    process = start("chord_megatron.cli", "train", config, *trackers, env={"HOLD_AT_CALL": "6"})
    run = tmp_path / "run"
    wait_until(lambda: sent(run, name) == 4, process)
    kill(process)
    assert finish(process).code == -signal.SIGKILL
    outcome = succeeded(train_here(config, *trackers))
    assert f"resuming {run} at step 4" in outcome.stdout

    if name == "mlflow":
        points = mlflow_history(uri, "train/loss")
    else:
        assert len(wandb_run_ids(run)) == 1
        points = [(row["_step"], row["train/loss"]) for row in wandb_rows(run) if "train/loss" in row]
    losses = [line["loss"] for line in read_metrics(run)]
    assert points == [*zip(STEPS, losses, strict=True)]  # on CPU a step that is taken again is the same


def sent(run: Path, name: str) -> int:
    """The last step of which a tracker was sent the loss."""
    from chord_megatron.tracking.trackers.memory import Memory

    path = run / "trackers" / f"{name}.json"
    return Memory.read(path).sent.get("train/loss", -1)
