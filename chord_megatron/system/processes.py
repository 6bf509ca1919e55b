"""What the processes of a run have in common. Of the standard library alone: rewards/worker.py reads this file."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

# Environment variables that the launcher sets.
STORE_FILE = "CHORD_STORE_FILE"  # where the processes of a run on one machine meet
LAUNCHER = "CHORD_LAUNCHER"  # its process id

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS_TO_ASK_AGAIN = 5  # Slurm, a shell and an agent may all send the same signal; later it means: now


def signal_name(number: int) -> str:
    """SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


@contextmanager
def stop_signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within, SIGTERM and SIGINT are the handler's; but in other threads, where Python lets nobody hear them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def end_before_the_run(number: int, _frame: FrameType | None) -> NoReturn:
    """What a signal does while a command imports what it needs, and checks: an exception there is pages of traceback.

    Nothing is written yet. The first process of a node speaks for all.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sentence = f"stopped by {signal_name(number)} before the run began; the same command starts it\n"
        os.write(2, sentence.encode())
    os._exit(128 + number)


def end_with_launcher() -> None:
    """End with the launcher or torchrun's agent: orphans would write on into a resumed run's files, or keep a port."""
    launcher = os.environ.get(LAUNCHER)
    if launcher or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if launcher and os.getppid() != int(launcher):  # it has ended before this process could ask for that
        sys.exit(128 + signal.SIGKILL)


def end_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when the thread that started it ends, however that ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal_number)


def guard(child: int, parent: int, *, passes_on_sigterm: bool = False) -> NoReturn:
    """Wait for a child, and end as it did; when the parent ends, end this process's whole group.

    What the child starts is in that group, too, and need not ask for its own parent's end.
    """

    def end_without_parent(*_: object) -> None:
        if os.getppid() != parent:  # else somebody else's signal
            os.killpg(0, signal.SIGKILL)
        if passes_on_sigterm:
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, end_without_parent)
    end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it has ended before
        os.killpg(0, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)  # as a shell reports signals
