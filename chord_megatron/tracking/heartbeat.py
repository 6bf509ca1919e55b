"""Where each rank is, told to the others every few seconds; and a line about one that the others wait for."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from chord_megatron.system.work import Work

SECONDS_UNTIL_LATE = 60.0
_BEATS_UNTIL_LATE = 4
_LOOKS_PER_BEAT = 15  # at most that often, each time the rank has moved


class Store(Protocol):
    """What all ranks read and write: torch.distributed's stores."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass
class Whereabouts:
    """What a process is doing. `moves` counts what it has entered and left: the same on all ranks at the same place."""

    phase: str = "the start"
    step: int | None = None  # from 0, as in metrics.jsonl; None: before the first
    moves: int = 0
    work: Work = field(default_factory=Work, compare=False)  # of this process alone: how far the phase is

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """In a phase; may nest. One that raises is not left: it is where the process ended."""
        outer = self.phase
        self.begin(f"{outer} {phase}" if outer == "evaluation" else phase)
        yield
        self.begin(outer)

    def begin(self, phase: str) -> None:
        """From now on in another phase, where phases follow one another."""
        self.phase, self.moves = phase, self.moves + 1
        self.work.begin()

    def __str__(self) -> str:
        return self.phase if self.step is None else f"{self.phase} of step {self.step}"


@dataclass
class _Seen:
    """What is known of a rank, and since when (seconds) nothing new of it."""

    where: Whereabouts | None
    silent_since: float
    unmoved_since: float
    beat: int = -1
    is_said: bool = False


@dataclass
class Attendance:
    """Tells who is late from what the ranks report: a pure account, its clock an argument."""

    ranks: Sequence[int]
    seconds_until_late: float
    now: float
    _seen: dict[int, _Seen] = field(init=False)

    def __post_init__(self) -> None:
        self._seen = {rank: _Seen(None, self.now, self.now) for rank in self.ranks}

    def report(self, rank: int, beat: int, where: Whereabouts, now: float) -> None:
        """A rank's latest word."""
        seen = self._seen[rank]
        if beat != seen.beat:
            seen.beat, seen.silent_since = beat, now
        if seen.where is None or where.moves != seen.where.moves:
            seen.where, seen.unmoved_since, seen.is_said = where, now, False

    def late(self, now: float) -> list[str]:
        """A sentence for each rank that is late, once until it moves again."""
        furthest = max((seen.where.moves for seen in self._seen.values() if seen.where), default=0)
        sentences = []
        for rank, seen in self._seen.items():
            if not seen.is_said and (sentence := self._about(seen, furthest, now)):
                seen.is_said = True
                sentences.append(f"rank {rank} {sentence}")
        return sentences

    def _about(self, seen: _Seen, furthest: int, now: float) -> str | None:
        silent, unmoved = now - seen.silent_since, now - seen.unmoved_since
        if seen.where is None:
            is_late = silent >= self.seconds_until_late
            return f"has not come for {silent:.0f} s: has its node started?" if is_late else None
        if silent >= self.seconds_until_late:
            return f"has given no sign of life for {silent:.0f} s, last in {seen.where}: stopped, or its node lost?"
        if seen.where.moves < furthest and unmoved >= self.seconds_until_late:
            return f"has been in {seen.where} for {unmoved:.0f} s, and the others wait for it"
        return None


class Heartbeat:
    """A thread that tells where this rank is, and on the first two ranks says who is late: one may be late itself."""

    def __init__(
        self,
        store: Store,
        where: Whereabouts,
        *,
        rank: int,
        world_size: int,
        seconds_until_late: float = SECONDS_UNTIL_LATE,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        clone = getattr(store, "clone", None)  # since torch 2.8; the store itself is blocked while somebody waits in it
        self._store: Store = clone() if clone else store
        self._where, self._rank, self._say = where, rank, say
        self._interval = seconds_until_late / _BEATS_UNTIL_LATE
        watched = range(world_size) if rank == 0 else [0] if rank == 1 else []
        self._attendance = Attendance([*watched], seconds_until_late, time.monotonic())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _run(self) -> None:
        where, told, beat, next_beat = self._where, -1, 0, 0.0
        try:
            while not self._ended.wait(self._interval / _LOOKS_PER_BEAT):
                is_beat = time.monotonic() >= next_beat
                if is_beat or where.moves != told:
                    told, beat = where.moves, beat + 1
                    self._store.set(_key(self._rank), json.dumps([beat, where.phase, where.step, where.moves]))
                if is_beat:
                    next_beat = time.monotonic() + self._interval
                    self._look()
        except RuntimeError:  # the store's rank has ended; the others meet that in what they do
            return

    def _look(self) -> None:
        attendance = self._attendance
        for rank in attendance.ranks:
            if self._store.check([_key(rank)]):
                beat, *place = json.loads(self._store.get(_key(rank)))
                attendance.report(rank, beat, Whereabouts(*place), time.monotonic())
        if not self._ended.is_set():
            for sentence in attendance.late(time.monotonic()):
                self._say(sentence)


def _key(rank: int) -> str:
    return f"chord_megatron/rank_{rank}"
