"""MLflow: a tracking server, or a store on disk. Its credentials come from its own environment variables."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chord_megatron.tracking.trackers.protocol import TrackedRun

_LONGEST_NAME = 250  # characters of a metric
_LONGEST_VALUE = 500  # characters of a parameter that every version takes


def open_tracker(run: TrackedRun) -> Mlflow:
    """Begin the run, or go on with it."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=run.uri)
    if run.run_id is not None:
        client.update_run(run.run_id, status="RUNNING")
        return Mlflow(client, run.run_id)
    experiment = client.get_experiment_by_name(run.project)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(run.project)
    tags = {**dict.fromkeys(run.tags, "true"), **({"group": run.group} if run.group else {})}
    tracker = Mlflow(client, client.create_run(experiment_id, run_name=run.label, tags=tags).info.run_id)
    tracker.parameters(run.config)
    return tracker


class Mlflow:
    """An open run. Everything is with the server, or on disk, when a method returns."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self.run_id = client, run_id
        self.place: str | None = f"run {run_id} of {client.tracking_uri}"

    def parameters(self, config: Mapping[str, Mapping[str, Any]]) -> None:
        """GROUP.KEY; they never change, so that a run that goes on keeps its first ones."""
        from mlflow.entities import Param

        values = {f"{group}.{key}": value for group, keys in config.items() for key, value in keys.items()}
        parameters = [Param(key, _text(value)[:_LONGEST_VALUE]) for key, value in values.items()]
        for first in range(0, len(parameters), 100):  # the most that a request may have
            self._client.log_batch(self.run_id, params=parameters[first : first + 100])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each metric."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self.run_id, metrics=[Metric(metric_name(tag), value, now, step) for tag, value in values.items()]
        )

    def text(self, step: int, tag: str, text: str) -> None:
        """A file of that name."""
        self._client.log_text(self.run_id, text, f"{tag}.txt")

    def table(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A file in the form of MLflow's tables."""
        columns = list(rows[0])
        table = {"columns": columns, "data": [[row[column] for column in columns] for row in rows]}
        self._client.log_dict(self.run_id, table, f"{tag}/step_{step}.json")

    def artifact(self, path: Path) -> None:
        """A file of that name."""
        self._client.log_artifact(self.run_id, str(path))

    def close(self, *, failed: bool) -> None:
        """The run ends."""
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


def metric_name(tag: str) -> str:
    """As MLflow takes it: a path without "..", empty parts, and characters beyond these; reward//my/reward.py:f."""
    parts = (part for part in re.sub(r"[^/\w.\- :]", "_", tag).split("/") if part.strip("."))
    return "/".join(parts)[-_LONGEST_NAME:].strip("/")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
