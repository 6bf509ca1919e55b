"""SIGTERM and SIGINT end a run: at once, or after its step with a checkpoint (train.save_on_signal)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from chord_megatron.system.errors import Interruption
from chord_megatron.system.processes import SECONDS_TO_ASK_AGAIN, signal_name, stop_signals_to

_FIRST = f"the step is finished and saved first; again after {SECONDS_TO_ASK_AGAIN} s it ends the run at once"


class Stopped(Interruption):
    """A signal has ended the run. No Exception, so that nobody takes it for a failure of their own."""

    def __init__(self, number: int, saved_step: int | None = None) -> None:
        self.number, self.saved_step = number, saved_step


class StopSignals:
    """What this process was told. Raises Stopped in the main thread, or only notes it for a step's end."""

    def __init__(self) -> None:
        self.received = 0  # the signal's number
        self.is_noted_only = False
        self._since = 0.0

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within, the two signals come here."""
        with stop_signals_to(self._hear):
            yield

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        is_first, now = not self.received, time.monotonic()
        if not is_first and now - self._since <= SECONDS_TO_ASK_AGAIN:
            return
        self.received, self._since = self.received or number, now
        if not (is_first and self.is_noted_only):
            raise Stopped(number)
        if os.environ.get("RANK", "0") == "0":  # a handler may come in the middle of a print: not another one
            os.write(2, f"{signal_name(number)}: {_FIRST}\n".encode())
