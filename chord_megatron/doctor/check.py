"""The result of a check, and trying things out where they cannot do harm."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

# used | something else takes its place | a feature is off without it | there, but of no use as it is
Status = Literal["ok", "replaced", "missing", "wrong"]

_IMPORT_SECONDS = 180.0  # a first import from a network disk is slow


@dataclass(frozen=True)
class Check:
    """What was found of one thing, what that means, and what to do."""

    name: str
    found: str | None  # a version or an amount
    status: Status
    meaning: str
    remedy: str | None = None
    is_blocking: bool = False  # training fails until it is mended

    @property
    def problem(self) -> str:
        """One line: what is wrong, and the remedy."""
        return f"{self.name}: {self.meaning}" + (f"; {self.remedy}" if self.remedy else "")


def import_error(*modules: str, timeout_seconds: float = _IMPORT_SECONDS) -> str | None:
    """Why these modules cannot be imported together, in one line; None where they can.

    A broken library may end or hang the process that imports it, so this one does not.
    """
    command = [sys.executable, "-c", "\n".join(f"import {module}" for module in modules)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return f"the import did not end within {timeout_seconds:g} s"
    return None if done.returncode == 0 else last_words(done.returncode, done.stderr)


def last_words(returncode: int, stderr: str) -> str:
    """The last line that a failed process wrote, or how it ended."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if returncode < 0:
        return f"the process was ended by signal {-returncode}"
    return lines[-1] if lines else f"the process ended with code {returncode}"
