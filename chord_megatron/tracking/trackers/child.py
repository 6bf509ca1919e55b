"""`python -m chord_megatron.tracking.trackers.child`: a tracker's library, and what remote.py asks of it."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from chord_megatron.system.sentences import one_line
from chord_megatron.tracking.trackers.protocol import LibraryTracker, TrackedRun

_SECONDS_TO_END = 20  # after the run has: then this process ends, whatever its library waits for


def main() -> None:
    """Answer requests until there are no more; of a run that ended without a word the tracker shows that it failed."""
    requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    tracker: LibraryTracker | None = None
    while (request := requests.get()) is not None:
        method = request.pop("method")
        try:
            if method == "open":
                tracker = _opened(**request)
            else:
                assert tracker is not None
                _call(tracker, method, request)
            answer = {"run_id": tracker.run_id, "place": tracker.place}
        except (Exception, SystemExit) as error:
            answer = {"error": one_line(error)}
        tracker = None if method == "close" else tracker
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    if tracker is not None:
        tracker.close(failed=True)


def _read(requests: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    requests.put(None)
    time.sleep(_SECONDS_TO_END)
    os._exit(1)


def _opened(name: str, run: dict[str, Any]) -> LibraryTracker:
    module: Any = import_module(f"chord_megatron.tracking.trackers.{name}")
    tracker: LibraryTracker = module.open_tracker(TrackedRun(**{**run, "directory": Path(run["directory"])}))
    return tracker


def _call(tracker: LibraryTracker, method: str, arguments: dict[str, Any]) -> None:
    match method:
        case "scalars":
            tracker.scalars(**arguments)
        case "text":
            tracker.text(**arguments)
        case "table":
            tracker.table(**arguments)
        case "artifact":
            tracker.artifact(Path(arguments["path"]))
        case _:
            tracker.close(**arguments)


if __name__ == "__main__":
    main()
