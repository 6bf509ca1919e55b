"""A tracker in a process of its own: its library sets signal handlers, prints, and waits at the end of its process.

Requests and answers are JSON lines; child.py is the other end.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chord_megatron.tracking.trackers.protocol import TrackedRun, TrackerGone


def open_remote(name: str, run: TrackedRun) -> RemoteTracker:
    """Open a tracker's run in a new process. Raises RuntimeError with what the library said."""
    return RemoteTracker(name, run)


class RemoteTracker:
    """See Tracker; every method waits for the answer, and raises RuntimeError with what the library said."""

    def __init__(self, name: str, run: TrackedRun) -> None:
        # In a session of its own: it outlives a kill of the run, and Ctrl-C, until it has sent what it has.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chord_megatron.tracking.trackers.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        settings = {**dataclasses.asdict(run), "directory": str(run.directory.absolute())}
        try:
            opened = self._ask("open", name=name, run=settings)
        except RuntimeError:
            self._end()
            raise
        self.run_id: str | None = opened["run_id"]
        self.place: str | None = opened["place"]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        self._ask("scalars", step=step, values=dict(values))

    def text(self, step: int, tag: str, text: str) -> None:
        """See Tracker."""
        self._ask("text", step=step, tag=tag, text=text)

    def table(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """See Tracker."""
        self._ask("table", step=step, tag=tag, rows=[dict(row) for row in rows])

    def artifact(self, path: Path) -> None:
        """See Tracker."""
        self._ask("artifact", path=str(path.absolute()))

    def close(self, *, failed: bool) -> None:
        """See Tracker; then its process ends."""
        self._ask("close", failed=failed)
        self._end()

    def _ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"method": method, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # its end of the pipe is closed
            raise TrackerGone("its process has ended") from None
        line = self._process.stdout.readline()
        if not line:
            raise TrackerGone("its process has ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
