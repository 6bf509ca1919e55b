"""A run that is killed and resumed is one run in its trackers, and has each step once."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import pytest
from harness import (
    finish,
    free_ports,
    kill,
    read_metrics,
    run_here,
    start,
    succeeded,
    train_here,
    wait_until,
    write_config,
)
from tracker_files import mlflow_history, wandb_rows, wandb_run_ids

from chord_megatron import __version__
from chord_megatron.tracking.trackers import opening

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

    assert (run / "config.yaml").read_text(encoding="utf-8").startswith(f"# chord_megatron {__version__}, commit ")
    if name == "mlflow":
        points = mlflow_history(uri, "train/loss")
    else:
        assert len(wandb_run_ids(run)) == 1
        points = [(row["_step"], row["train/loss"]) for row in wandb_rows(run) if "train/loss" in row]
    losses = [line["loss"] for line in read_metrics(run)]
    assert points == [*zip(STEPS, losses, strict=True)]  # on CPU a step that is taken again is the same


@pytest.mark.parametrize("command", ["validate", "train"])
def test_a_tracker_that_is_not_installed_is_refused_at_once(
    command: str, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "find_spec", lambda name: None)  # whatever this environment has
    outcome = run_here(command, write_config(assets, tmp_path), "tracking.report_to=[swanlab]")
    assert (outcome.code, outcome.stderr) == (
        2,
        "error: tracking.report_to names swanlab, which is not installed; run pip install 'chord_megatron[swanlab]', "
        "or leave it out\n",
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_answers_prometheus(assets: Path, tmp_path: Path) -> None:
    """Held in its third step."""
    (port,) = free_ports(1)
    arguments = ("train", write_config(assets, tmp_path), f"tracking.prometheus_port={port}")
    process = start("chord_megatron.cli", *arguments, env={"HOLD_AT_CALL": "3"})
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) == 2, process)
    wait_until(lambda: told(port)["chord_step"] == 1, process)
    loss = told(port)["chord_train_loss"]
    kill(process)
    assert loss == read_metrics(tmp_path / "run")[-1]["loss"]


def told(port: int) -> dict[str, float]:
    """Prometheus's gauges."""
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.split(" ") for line in lines if not line.startswith("#"))}


def sent(run: Path, name: str) -> int:
    """The last step of which a tracker was sent the loss."""
    from chord_megatron.tracking.trackers.memory import Memory

    path = run / "trackers" / f"{name}.json"
    return Memory.read(path).sent.get("train/loss", -1)
