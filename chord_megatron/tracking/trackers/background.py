"""A tracker whose library may be slow, wrong, or gone with its server: training neither waits for it nor ends by it."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chord_megatron.system.secrets import without_secrets
from chord_megatron.system.sentences import one_line
from chord_megatron.tracking.trackers.memory import Memory
from chord_megatron.tracking.trackers.protocol import LibraryTracker, TrackedRun, Tracker, TrackerGone

MOST_WAITING = 256  # calls
SECONDS_TO_ANSWER = 60.0  # a call
SECONDS_TO_OPEN_AGAIN = 60.0  # after it could not be opened
SECONDS_TO_CLOSE, SECONDS_TO_CLOSE_FAILED = 30.0, 10.0  # launchers wait for 30 before they kill

Call = Callable[[Tracker], None]


class BackgroundTracker:
    """Has its own thread make the calls, in order. What fails is counted in `errors`, and said the first time.

    `memory`: a point that the tracker has already is not sent again.
    """

    def __init__(
        self,
        name: str,
        run: TrackedRun,
        open_tracker: Callable[[TrackedRun], LibraryTracker],
        memory: Memory,
        *,
        say: Callable[[str], None],
    ) -> None:
        self.errors = 0
        self._name, self._run, self._open, self._memory, self._say = name, run, open_tracker, memory, say
        self._tracker: LibraryTracker | None = None
        self._refusal, self._refused_at = "", -SECONDS_TO_OPEN_AGAIN
        self._busy_since: float | None = None
        self._lock, self._has_said = threading.Lock(), False
        self._calls: queue.Queue[Call | None] = queue.Queue(MOST_WAITING)  # None: the end
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()
        self._call(lambda tracker: None)  # opens it

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker; the points that are new."""
        self._call(lambda tracker: self._send_scalars(tracker, step, values))

    def text(self, step: int, tag: str, text: str) -> None:
        """See Tracker."""
        self._call(lambda tracker: tracker.text(step, tag, text))

    def table(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """See Tracker; one that is new."""
        self._call(lambda tracker: self._send_table(tracker, step, tag, rows))

    def artifact(self, path: Path) -> None:
        """See Tracker."""
        self._call(lambda tracker: tracker.artifact(path))

    def close(self, *, failed: bool) -> None:
        """See Tracker; waits for it for some seconds."""
        limit = SECONDS_TO_CLOSE_FAILED if failed else SECONDS_TO_CLOSE
        deadline = time.monotonic() + limit
        try:
            self._calls.put(lambda tracker: tracker.close(failed=failed), timeout=limit)
            self._calls.put(None, timeout=max(deadline - time.monotonic(), 0.1))
            self._thread.join(max(deadline - time.monotonic(), 0.1))
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._failed(f"has not taken what is left within {limit:.0f} s")
        if self.errors:
            self._say(f"{self._name}: {self.errors} calls failed in all")

    def _call(self, call: Call) -> None:
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > SECONDS_TO_ANSWER and not self._has_said:
            self._failed(f"has not answered for {SECONDS_TO_ANSWER:.0f} s")
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._failed(f"is {MOST_WAITING} calls behind")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self._busy_since = time.monotonic()
            try:
                call(self._opened())
            except Exception as error:
                if isinstance(error, TrackerGone):
                    self._tracker = None
                    self._refuse(error)
                self._failed(f"says {one_line(error)}")
            self._busy_since = None

    def _opened(self) -> LibraryTracker:
        if self._tracker is not None:
            return self._tracker
        if time.monotonic() - self._refused_at < SECONDS_TO_OPEN_AGAIN:
            raise RuntimeError(self._refusal)
        try:
            tracker = self._open(dataclasses.replace(self._run, run_id=self._memory.run_id))
        except Exception as error:
            self._refuse(error)
            raise
        self._tracker = tracker
        self._remember(self._memory.of_run(tracker.run_id))
        if tracker.place:
            self._say(without_secrets(f"{self._name}: {tracker.place}"))
        return tracker

    def _refuse(self, error: Exception) -> None:
        self._refusal, self._refused_at = one_line(error), time.monotonic()

    def _send_scalars(self, tracker: Tracker, step: int, values: Mapping[str, float]) -> None:
        new = {tag: value for tag, value in values.items() if self._memory.lacks(tag, step)}
        if new:
            self._sending(new, step, lambda: tracker.scalars(step, new))

    def _send_table(self, tracker: Tracker, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._memory.lacks(tag, step):
            self._sending([tag], step, lambda: tracker.table(step, tag, rows))

    def _sending(self, tags: Mapping[str, float] | Sequence[str], step: int, send: Callable[[], None]) -> None:
        """Remembered first: of a process that is killed between the two a point is missing, and none is there twice."""
        before = self._memory
        self._remember(before.with_sent(tags, step))
        try:
            send()
        except Exception:
            self._remember(before)
            raise

    def _remember(self, memory: Memory) -> None:
        if memory is not self._memory:
            memory.write()
            self._memory = memory

    def _failed(self, what: str) -> None:
        with self._lock:
            self.errors += 1
            is_first, self._has_said = not self._has_said, True
        if is_first:
            remedy = "training goes on, metrics.jsonl has everything, and tracker_errors counts what fails"
            self._say(without_secrets(f"{self._name} {what}; {remedy}"))
