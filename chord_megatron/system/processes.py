"""What the processes that this package starts have in common."""

from __future__ import annotations

import ctypes
import signal
import sys

STORE_FILE = "CHORD_STORE_FILE"  # environment variable: where the processes of a run on one machine meet


def end_with_parent() -> None:
    """Have Linux kill this process when the one that started it ends, however that ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
