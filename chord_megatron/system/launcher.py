"""The processes of a run on this machine: started, watched, told of signals, and named when they end badly.

As torchrun does without restarts, but nothing here listens: processes on one machine meet through a file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from chord_megatron.system.processes import LAUNCHER, SECONDS_TO_ASK_AGAIN, STORE_FILE, signal_name, stop_signals_to

_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_TO_STOP = 30  # after a signal: then they are killed, as torchrun does


@dataclass(frozen=True)
class Launch:
    """How many processes, and where they meet."""

    nproc_per_node: int
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500

    @property
    def world_size(self) -> int:
        return self.nproc_per_node * self.nnodes

    def places(self, meeting: dict[str, str]) -> dict[int, dict[str, str]]:
        """Rank -> environment variables of each process on this node; the names are torchrun's."""
        first = self.node_rank * self.nproc_per_node
        shared = {
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.nproc_per_node),
            "GROUP_RANK": str(self.node_rank),
            LAUNCHER: str(os.getpid()),
            **meeting,
        }
        return {
            first + local: {**shared, "RANK": str(first + local), "LOCAL_RANK": str(local)}
            for local in range(self.nproc_per_node)
        }

    @contextmanager
    def meeting(self) -> Iterator[dict[str, str]]:
        """Where the processes find one another, as environment variables."""
        if self.nnodes > 1:
            yield {"MASTER_ADDR": self.master_addr, "MASTER_PORT": str(self.master_port)}
            return
        store = os.memfd_create("chord-store")  # in no folder: it goes with its processes, however they end
        try:  # /proc/PID/fd is the user's alone
            yield {"MASTER_ADDR": "127.0.0.1", STORE_FILE: f"/proc/{os.getpid()}/fd/{store}"}
        finally:
            os.close(store)


def run_processes(launch: Launch, command: Sequence[str], *, finishes_its_step: bool) -> int:
    """Run `command` in every place of this node; returns the exit code of the job, and says who was ended by a signal.

    The first process that fails ends the others. SIGTERM and SIGINT are passed on; processes that finish their step
    first have as long as they need, and others 30 s. The same signal again ends all at once.
    """
    with launch.meeting() as meeting:
        # One compute thread per process, unless the user says otherwise: torchrun's own default.
        # Of a rank that has gone torch prints stacks of C++ as warnings, behind our sentence.
        shared = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
        job = _Job(None if finishes_its_step else _SECONDS_TO_STOP)
        with stop_signals_to(job.pass_on):
            try:
                for rank, place in launch.places(meeting).items():
                    # A session of its own: a terminal's Ctrl-C comes through this process, once.
                    job.processes[rank] = subprocess.Popen(command, env={**shared, **place}, start_new_session=True)
                return job.watch()
            finally:
                job.kill()


class _Job:
    def __init__(self, seconds_to_stop: float | None) -> None:
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._seconds_to_stop = seconds_to_stop
        self._signal = 0
        self._signalled = 0.0  # when, by time.monotonic

    def watch(self) -> int:
        """Wait until all have ended, or one badly; the exit code of the job."""
        while self._running() and (self._signal or not self._failures()):
            if self._signal and self._seconds_to_stop and self._seconds_since_signal() > self._seconds_to_stop:
                self.kill()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        failures = self._failures()
        if not failures:
            return 0
        if self._signal:
            return 128 + self._signal
        rank = min(failures, key=lambda rank: failures[rank] > 0)  # who was ended by a signal took the others along
        code = failures[rank]
        if code > 0:
            return code
        cause = ": out of memory? `dmesg` says whom the kernel has killed" if -code == signal.SIGKILL else ""
        print(f"error: rank {rank} was ended by {signal_name(-code)}{cause}", file=sys.stderr, flush=True)
        return 128 - code

    def kill(self) -> None:
        """End those that are left. They have nothing to say any more, and may wait in a collective."""
        self._send(signal.SIGKILL)
        for process in self.processes.values():
            process.wait()

    def pass_on(self, number: int, _frame: FrameType | None) -> None:
        """A signal, to all; a later one ends them."""
        if not self._signal:
            self._signal, self._signalled = number, time.monotonic()
            self._send(number)
        elif self._seconds_since_signal() > SECONDS_TO_ASK_AGAIN:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for process in self._running():
            process.send_signal(number)

    def _seconds_since_signal(self) -> float:
        return time.monotonic() - self._signalled

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.processes.values() if process.poll() is None]

    def _failures(self) -> dict[int, int]:
        """Rank -> exit code, negative for a signal."""
        return {rank: process.returncode for rank, process in self.processes.items() if process.returncode}
