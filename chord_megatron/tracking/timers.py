"""Where the seconds of a training step go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from chord_megatron.tracking.heartbeat import Whereabouts

PHASES = ("rollout", "reward", "log_probs", "train", "sync")


class PhaseTimer:
    """Accumulates seconds by phase: `with timer("rollout"): ...`. Phases may nest; "step" spans the others.

    `synchronize` runs before each reading of the clock, so that queued device work is charged to the
    phase that queued it (pass `torch.cuda.synchronize`). `where` is told of the phase.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        where: Whereabouts | None = None,
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._where = where or Whereabouts()
        self._seconds = self._zeros()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to `phase`. A block that raises is not counted."""
        assert phase in self._seconds, f"unknown phase {phase!r}, expected one of {list(self._seconds)}"
        start = self._now()
        with self._where.within(phase):
            yield
        self._seconds[phase] += self._now() - start

    def times(self) -> dict[str, float]:
        """Seconds since the last call as `time_<phase>`, 0 for a phase that did not run; starts anew."""
        seconds, self._seconds = self._seconds, self._zeros()
        return {f"time_{phase}": value for phase, value in seconds.items()}

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return self._clock()

    @staticmethod
    def _zeros() -> dict[str, float]:
        return dict.fromkeys((*PHASES, "step"), 0.0)
