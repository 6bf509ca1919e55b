"""What a run is waiting for, said where nothing else is for a while: on a terminal in its bars, elsewhere in lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from chord_megatron.system.work import Work
from chord_megatron.tracking.heartbeat import Whereabouts
from chord_megatron.tracking.progress import format_duration

SECONDS_UNTIL_SAID = 10.0
_SECONDS_BETWEEN_LOOKS = 0.5

Show = Callable[[Work, str, bool], None]  # the line, and whether it is due where lines stay


def in_words(where: Whereabouts, seconds: float, *, counting: float | None = None) -> str:
    """Where a process is, how far, and how long that takes: `rollout of step 3: 40 of 256 completions, ...`.

    At the start of a run `seconds` are those since it began; `counting` are those of what is counted, where fewer.
    """
    work = where.work
    if not work.total:
        waiting = f", {work.what}" if work.what else ""
        return f"{where}{waiting}: {format_duration(seconds)} so far"
    counted = counting or seconds
    rate = (work.done - work.before) / counted if counted else 0.0
    speed = f", {rate:.3g}/s, ETA {format_duration((work.total - work.done) / rate)}" if rate else ""
    return f"{where}: {work.done} of {work.total} {work.what}{speed} ({format_duration(seconds)} so far)"


@dataclass
class Waits:
    """Decides when a line is due: a pure account, its clock an argument.

    The first time that a phase takes ten seconds, and again after twice as many. A later one is to take twice as long
    as any before it, so that steps of minutes, each of which has a line of its own, are not said three times.
    """

    began: float
    _phase: str = ""
    _moves: int = -1
    _due: float = SECONDS_UNTIL_SAID  # seconds since `began`
    _longest: dict[str, float] = field(default_factory=dict)

    def due(self, where: Whereabouts, now: float) -> bool:
        """Whether to say now what is waited for."""
        if where.moves != self._moves and where.step is not None:
            self._longest[self._phase] = max(self._longest.get(self._phase, 0.0), now - self.began)
            self.began = now
            self._due = max(SECONDS_UNTIL_SAID, 2 * self._longest.get(where.phase, 0.0))
        self._phase, self._moves = where.phase, where.moves
        if now - self.began < self._due:
            return False
        self._due *= 2
        return True


class Watch:
    """A thread of rank 0 that looks where its process is. `show` is called from it, and may be changed."""

    def __init__(self, where: Whereabouts) -> None:
        self.show: Show = _print
        self._where, self._ended = where, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        waits = Waits(time.monotonic())
        while not self._ended.wait(_SECONDS_BETWEEN_LOOKS):
            now = time.monotonic()
            is_due = waits.due(self._where, now)
            line = in_words(self._where, now - waits.began, counting=now - self._where.work.began)
            self.show(self._where.work, line, is_due)


def _print(_work: Work, line: str, is_due: bool) -> None:
    """Before there is a log."""
    if is_due:
        print(line, flush=True)
