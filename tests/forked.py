"""Starts jobs of one or several processes that need not import torch and Megatron-Core first.

Importing them takes longer than most jobs. So one process has done it (multiprocessing's fork server), has done nothing
else, and each process of a job is a fork of that one: as fresh as a new interpreter.
"""

from __future__ import annotations

import importlib
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection, forkserver, get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from unittest.mock import patch

from chord_megatron.system.processes import end_with_parent

# A GPU would make the processes share it through NCCL, which refuses that.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
_PRELOADED = ["chord_megatron.training.main", "chord_megatron.backend.cpu", "chord_megatron.tracking.report"]
_SECONDS_TO_END = 10


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def run(
    program: str | Path,
    *arguments: object,
    processes: int = 1,
    timeout_seconds: float = 900,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a module (by name) or a script in that many processes; raises AssertionError at the time limit.

    As under torchrun, the first that fails ends the others, and its exit code is that of the job.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        started = [
            _start(str(program), arguments, output, {**os.environ, **ENVIRONMENT, **place, **(env or {})})
            for place in _places(processes)
        ]
        try:
            code = _wait(started, time.monotonic() + timeout_seconds)
        finally:
            _end(started)
        outcome = Outcome(code or 0, *(_read(output, stream) for stream in ("stdout", "stderr")))
    assert code is not None, f"{program} took more than {timeout_seconds} s: {outcome.stderr[-8000:]}"
    return outcome


def launch(script: Path, *arguments: object, processes: int, timeout_seconds: float = 900) -> str:
    """Run a script that must succeed; returns what it printed."""
    outcome = run(script, *arguments, processes=processes, timeout_seconds=timeout_seconds)
    assert outcome.code == 0, f"{script} ended with {outcome.code}: {outcome.stdout[-4000:]}{outcome.stderr[-8000:]}"
    return outcome.stdout


def _places(processes: int) -> list[dict[str, str]]:
    """What torchrun would tell each process; a single one is started without it."""
    if processes == 1:
        return [{}]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    job = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


@cache
def context() -> ForkServerContext:
    """Of the fork server, of which a process has one: who starts processes otherwise calls this first."""
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return context


def _start(program: str, arguments: tuple[object, ...], output: Path, env: dict[str, str]) -> ForkServerProcess:
    process = context().Process(target=_run, args=(program, [*map(str, arguments)], output, env))
    process.start()
    return process


def _run(program: str, arguments: list[str], output: Path, env: dict[str, str]) -> None:
    """What a forked process does."""
    if _PRELOADED[0] not in sys.modules:
        importlib.import_module(_PRELOADED[0])  # raises what the fork server passes over in silence
        raise AssertionError("the fork server has not imported what it should: something else has started it before")
    end_with_parent()  # the fork server, which ends with the tests
    os.environ.clear()
    os.environ.update(env)
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(output / f"{stream}.{env.get('RANK', '0')}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _wait(processes: list[ForkServerProcess], deadline: float) -> int | None:
    """The exit code of the first that failed, 0 of a job that succeeded, or None at the deadline."""
    running = {process.sentinel: process for process in processes}
    while running:
        ended = connection.wait(running, timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            return None
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                return process.exitcode
    return 0


def _end(processes: list[ForkServerProcess]) -> None:
    """End those that are left: ask first."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(timeout=_SECONDS_TO_END)
        process.kill()
        process.join()


def _read(output: Path, stream: str) -> str:
    """What all processes have written to a stream, one after the other."""
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(output.glob(f"{stream}.*")))
