"""What the processes that this package starts have in common."""

from __future__ import annotations

import ctypes
import signal
import sys


def end_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when the thread that started it ends, however that ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal_number)
