"""TensorBoard's event files, written at once and by nobody else.

torch's SummaryWriter hands each number to a thread, which says by a traceback of its own that a disk is full, and to
the caller only at the next number; by then more is lost than the step at hand.
"""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from chord_megatron.system.atomic import failed_writes_named
from chord_megatron.system.files import AppendedFile


class Curves:
    """A new event file in `directory`; TensorBoard drops what earlier ones hold from `resume_step` on (None: nothing).

    Raises UserError, here and in `write`, where the file cannot be written.
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

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """A point of each curve, by tag."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._append([Event(wall_time=time.time(), step=step, summary=Summary(value=values))])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, events: list[Event]) -> None:
        content = io.BytesIO()
        records = RecordWriter(content)
        for event in events:
            records.write(event.SerializeToString())
        self._file.write(content.getvalue())
