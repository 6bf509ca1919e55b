"""Starts the workers of these tests under torchrun, on CPU, with a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

# A GPU would make the processes share it through NCCL, which refuses that.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
_GRACE_SECONDS = 30  # torchrun needs a moment to end its workers, which live in sessions of their own


def launch(script: Path, *arguments: object, processes: int, timeout_seconds: float = 900) -> str:
    """Run `script` in that many processes; returns what they printed. Raises AssertionError where it fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(script), *map(str, arguments)]
    process = subprocess.Popen(
        command,
        env={**os.environ, **_ENVIRONMENT},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{command} took more than {timeout_seconds} s:\n{_end(process)}") from None
    except BaseException:
        _end(process)
        raise
    assert process.returncode == 0, f"{command} ended with {process.returncode}:\n{output[-8000:]}"
    return output


def _end(process: subprocess.Popen[str]) -> str:
    """Ask first, because only torchrun can end its workers."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.communicate(timeout=_GRACE_SECONDS)[0][-8000:]
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0][-8000:]
