"""What the libraries of trackers leave on disk, read back."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7  # bytes; of a file, and of a record


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a log in LevelDB's format behind a header of 7 bytes, as W&B and SwanLab write it.

    The last one may be torn.
    """
    content, place, record = path.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(content):
        if _BLOCK - place % _BLOCK < _HEADER:  # the end of a block that has no room for a header
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += _HEADER
        record += content[place : place + length]
        place += length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_rows(run: Path) -> list[dict[str, Any]]:
    """The history of all offline folders of a run, in the order of their starts."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for content in log_records(path):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items()})
    return rows


def wandb_run_ids(run: Path) -> set[str]:
    """Of all offline folders of a run."""
    return {path.name.split("-")[-1] for path in (run / "wandb").glob("offline-run-*")}


def mlflow_history(uri: str, key: str) -> list[tuple[int, float]]:
    """The points of a metric of the only run there, in order."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("chord_megatron")
    (run,) = client.search_runs([experiment.experiment_id])
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
