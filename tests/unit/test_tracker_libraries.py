"""The trackers' own libraries, offline or with a local store, in the process that a run gives them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tracker_files import log_records, mlflow_history, wandb_rows, wandb_run_ids

from chord_megatron.system.files import read_json_lines
from chord_megatron.tracking.run_log import RunLog
from chord_megatron.tracking.trackers import background
from chord_megatron.tracking.trackers.protocol import TrackedRun, TrackerGone
from chord_megatron.tracking.trackers.remote import open_remote

ROWS = [
    {"prompt": "1 + 1 = <b>", "completion": "2", "reference": None, "reward": 1.0},
    {"prompt": "é", "completion": "\u2028", "reference": "5", "reward": None},
]
REWARD = {"reward//my/../reward.py:f(é)": 0.25}  # of a function of the user's, by its path
CONFIG = {"model": {"path": "model", "chat": {"a": 1}}, "train": {"seed": 0, "eval_steps": None}}


def need(name: str) -> None:
    pytest.importorskip(name, reason=f"the extra {name} is not installed")


def tracked(directory: Path, **settings: Any) -> TrackedRun:
    return TrackedRun(directory, name="a name", group="seeds", tags=["chord", "tiny"], config=CONFIG, **settings)


def write_run(run: TrackedRun, name: str) -> None:
    """Three steps, from three evaluations; resumed at the second, and finished after the third."""

    def log_steps(first: int, resume_step: int | None) -> None:
        stream = io.StringIO()
        with RunLog(
            run.directory, train_iters=3, report_to=(name,), resume_step=resume_step, tracked=run, stream=stream
        ) as log:
            for step in range(first, 3):
                if log.last_eval_step != step:
                    log.log_eval(step, {"eval_reward_mean": step / 4})
                log.log_step({"step": step, "loss": 1.0 + step + first / 8, "expert_p/0.0": 0.5, "kl": None, **REWARD})
                log.log_completions(step, ROWS)
            if resume_step is not None:
                log.log_step({"step": 3, "loss": 0.5})
                log.track_text(4, "findings", "a\n<b>")
                log.track_artifact(run.directory / "metrics.jsonl")
        assert "tracker_errors" not in stream.getvalue() and "failed" not in stream.getvalue()

    log_steps(0, None)
    log_steps(1, 1)
    assert all(row["tracker_errors"] == 0 for row in read_json_lines(run.directory / "metrics.jsonl") if "loss" in row)


def test_wandb_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    write_run(tracked(tmp_path), "wandb")
    rows = wandb_rows(tmp_path)
    assert [(row["_step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (0, 1.0),
        (1, 2.0),
        (2, 3.0),
        (3, 0.5),
    ]
    assert [row["reward//my/../reward.py:f(é)"] for row in rows[:3]] == [0.25, 0.25, 0.25]
    assert [row["eval/reward_mean"] for row in rows[:3]] == [0.0, 0.25, 0.5]
    assert len(wandb_run_ids(tmp_path)) == 1
    (table,) = {path.read_text() for path in tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")}
    assert json.loads(table) == {"columns": [*ROWS[0]], "data": [[*row.values()] for row in ROWS]}
    pages = [path.read_text() for path in sorted(tmp_path.glob("wandb/offline-run-*/files/media/html/findings*.html"))]
    assert pages == ["<pre>a\n&lt;b&gt;</pre>"]
    assert b"0123456789abcdef0123456789abcdef01234567" not in b"".join(
        path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )
    first = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))[0]
    assert wandb_settings(first) == {"name": "a name", "group": "seeds", "tags": ["chord", "tiny"], "config": CONFIG}


def wandb_settings(path: Path) -> dict[str, Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    records = [Record.FromString(content) for content in log_records(path)]
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    return {
        "name": run.display_name,
        "group": run.run_group,
        "tags": [*run.tags],
        "config": {group: config[group] for group in CONFIG},
    }


def test_mlflow_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("mlflow")
    pytest.importorskip("sqlalchemy", reason="MLflow's local store needs SQLAlchemy")
    pytest.importorskip("alembic", reason="MLflow's local store needs Alembic")
    monkeypatch.chdir(tmp_path)  # its files lie there
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    write_run(tracked(tmp_path, uri=uri), "mlflow")
    assert mlflow_history(uri, "train/loss") == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 0.5)]
    assert mlflow_history(uri, "eval/reward_mean") == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert mlflow_history(uri, "reward/my/reward.py:f_é_") == [(0, 0.25), (1, 0.25), (2, 0.25)]
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("chord_megatron").experiment_id])
    assert (run.info.run_name, run.info.status) == ("a name", "FINISHED")
    assert run.data.params == {
        "model.path": "model",
        "model.chat": '{"a": 1}',
        "train.seed": "0",
        "train.eval_steps": "null",
    }
    assert {key: value for key, value in run.data.tags.items() if "." not in key} == {
        "group": "seeds",
        "chord": "true",
        "tiny": "true",
    }
    assert client.search_runs([run.info.experiment_id])[0].info.run_id == run.info.run_id
    folder = tmp_path / "mlruns"
    (table,) = {path.read_text() for path in folder.rglob("completions/step_1.json")}
    assert json.loads(table) == {"columns": [*ROWS[0]], "data": [[*row.values()] for row in ROWS]}
    assert [path.read_text() for path in folder.rglob("findings.txt")] == ["a\n<b>"]
    assert len([*folder.rglob("metrics.jsonl")]) == 1


def test_swanlab_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    write_run(tracked(tmp_path), "swanlab")
    folders = sorted((tmp_path / "swanlab").glob("run-*"))
    assert len({folder.name.split("-")[-1] for folder in folders}) == 1
    assert [swanlab_steps(folder, "train/loss") for folder in folders] == [[0, 1, 2], [3]]
    assert [path.read_text() for path in tmp_path.glob("swanlab/*/media/text/*")] == ["a\n<b>"]
    assert (folders[0] / "files" / "config.yaml").read_text().count("eval_steps") == 1


def swanlab_steps(folder: Path, key: str) -> list[int]:
    """The steps of a metric in a run's log."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    (path,) = folder.glob("*.swanlab")
    return [
        record.scalar.step
        for content in log_records(path)
        if (record := Record.FromString(content)).WhichOneof("record_type") == "scalar" and record.scalar.key == key
    ]


@pytest.mark.parametrize("mode", ["without a key", "with a wrong address"])
def test_wandb_without_a_server_is_said_and_counted(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(background, "SECONDS_TO_CLOSE", 5.0)
    if mode == "with a wrong address":
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    stream = io.StringIO()
    with RunLog(tmp_path / "run", train_iters=2, report_to=("wandb",), stream=stream) as log:
        for step in range(2):
            log.log_step({"step": step, "loss": 0.5})
    assert [row["loss"] for row in read_json_lines(tmp_path / "run" / "metrics.jsonl")] == [0.5, 0.5]
    said = [line for line in stream.getvalue().splitlines() if line.startswith("wandb ")]
    assert len(said) == 1 and said[0].endswith("and tracker_errors counts what fails")
    assert "0123456789abcdef" not in stream.getvalue()
    if mode == "without a key":
        assert said[0].startswith("wandb says there is no key: run `wandb login`, or set WANDB_API_KEY, or")


def test_its_process_may_be_killed_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = open_remote("wandb", tracked(tmp_path))
    tracker.scalars(0, {"train/loss": 0.5})
    tracker._process.kill()
    with pytest.raises(TrackerGone, match="its process has ended"):
        tracker.scalars(1, {"train/loss": 0.5})
    again = open_remote("wandb", dataclasses.replace(tracked(tmp_path), run_id=tracker.run_id))
    again.scalars(1, {"train/loss": 0.25})
    again.close(failed=False)
    assert again.run_id == tracker.run_id


def test_a_stopped_process_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library hangs for good: the run ends in time, and says so."""
    need("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(background, "SECONDS_TO_CLOSE", 1.0)
    stream = io.StringIO()
    with RunLog(tmp_path, train_iters=2, report_to=("wandb",), stream=stream) as log:
        log.log_step({"step": 0, "loss": 0.5})
        (tracker,) = log._trackers
        while tracker._tracker is None:  # type: ignore[attr-defined]
            time.sleep(0.01)
        child = psutil.Process(tracker._tracker._process.pid)  # type: ignore[attr-defined]
        os.kill(child.pid, signal.SIGSTOP)
        log.log_step({"step": 1, "loss": 0.25})
    assert "wandb has not taken what is left within 1 s; training goes on" in stream.getvalue()
    assert [row["loss"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == [0.5, 0.25]
    child.kill()
