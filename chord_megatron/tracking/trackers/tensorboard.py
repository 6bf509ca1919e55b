"""TensorBoard's event files, written at once and by nobody else.

torch's SummaryWriter hands each number to a thread, which says by a traceback of its own that a disk is full, and to
the caller only at the next number; by then more is lost than the step at hand.
"""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from chord_megatron.system.atomic import failed_writes_named
from chord_megatron.system.files import AppendedFile
from chord_megatron.tracking.trackers.protocol import TrackedRun


def open_tracker(run: TrackedRun) -> TensorBoard:
    """Raises UserError."""
    return TensorBoard(run.directory / "tensorboard", run.resume_step)


class TensorBoard:
    """A new event file in `directory`; TensorBoard drops what earlier ones hold from `resume_step` on (None: nothing).

    Of curves alone. Raises UserError, here and in `scalars`, where the file cannot be written.
    """

    def __init__(self, directory: Path, resume_step: int | None) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}.{os.getpid()}"  # as TensorBoard finds them
        with failed_writes_named(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = AppendedFile(directory / name)
        events = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            events.append(Event(wall_time=time.time(), step=resume_step, session_log=start))
        self._append(events)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve, by tag."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._append([Event(wall_time=time.time(), step=step, summary=Summary(value=points))])

    def text(self, step: int, tag: str, text: str) -> None:
        """The report has it."""

    def table(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """completions.jsonl has them."""

    def artifact(self, path: Path) -> None:
        """It is beside the event file."""

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, events: list[Event]) -> None:
        content = io.BytesIO()
        records = RecordWriter(content)
        for event in events:
            records.write(event.SerializeToString())
        self._file.write(content.getvalue())
