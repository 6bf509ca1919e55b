"""`chord-megatron serve`: a vLLM server for rollouts, kept running. vLLM itself runs in a child process.

The server starts without weights (a trainer sends them) and refuses to sample until it has a complete update. When an
update breaks off, the trainer asks it to restart: the child exits, and this process starts another.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chord_megatron.rollout.serving.guard import IDENTITY_VARIABLE, RESTART_EXIT_CODE
from chord_megatron.rollout.updates.agreement import identity, read_token
from chord_megatron.rollout.vllm_adapter import engine_arguments, prepare_environment
from chord_megatron.system.listening import is_loopback, listen_on_loopback
from chord_megatron.system.processes import LAUNCHER
from chord_megatron.system.quiet import silenced_environment

_MAX_QUICK_FAILURES = 3
_QUICK_SECONDS = 300  # a child that ran for longer had started well
_SECONDS_TO_STOP = 20


@dataclass(frozen=True)
class ServerOptions:
    """What `chord-megatron serve` was told."""

    model_dir: Path
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "bfloat16"
    tensor_parallel_size: int = 1
    max_model_len: int = 4096
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.9
    vllm_arguments: Sequence[str] = ()


def serve(options: ServerOptions) -> int:
    """Run a server until this process is told to end; returns the exit code. Raises UserError."""
    read_token()
    prepare_environment()
    if is_loopback(options.host):  # otherwise a trainer elsewhere may broadcast to the workers
        listen_on_loopback(nccl=True)
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    environment = {
        **os.environ,
        **silenced_environment(),
        IDENTITY_VARIABLE: json.dumps(identity(options.model_dir, options.dtype)),
        "VLLM_SERVER_DEV_MODE": "1",  # what has the routes for weight updates
    }
    return _supervise(_command(options), environment)


def _command(options: ServerOptions) -> list[str]:
    arguments = {
        **engine_arguments(
            options.model_dir,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
        ),
        "host": options.host,
        "port": options.port,
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "weight_transfer_config": {"backend": "chord"},
        "middleware": "chord_megatron.rollout.serving.guard.ServerGuard",
    }
    arguments = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in arguments.items()}
    flags = [part for name, value in arguments.items() for part in ("--" + name.replace("_", "-"), str(value))]
    flags += ["--enable-scale-out", "--disable-uvicorn-access-log", *options.vllm_arguments]
    return [sys.executable, "-m", "chord_megatron.rollout.serving.vllm_server", *flags]


def _supervise(command: Sequence[str], environment: dict[str, str]) -> int:
    """Start the server, and start it again whenever it ends, unless it cannot start at all."""
    stopping = False
    child: subprocess.Popen[bytes] | None = None

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        if child is not None:
            child.terminate()
            killer = threading.Timer(_SECONDS_TO_STOP, child.kill)
            killer.daemon = True
            killer.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    failures = 0
    while not stopping:
        started = time.monotonic()
        # A session of its own, so that all of its processes can be ended with it.
        child = subprocess.Popen(command, env={**environment, LAUNCHER: str(os.getpid())}, start_new_session=True)
        code = child.wait()
        _end_group(child.pid)
        if stopping:
            break
        if code == 2:
            return 2
        asked = code == RESTART_EXIT_CODE
        failures = 0 if asked or time.monotonic() - started > _QUICK_SECONDS else failures + 1
        if failures == _MAX_QUICK_FAILURES:
            print(f"error: the server ended {failures} times soon after its start; see above", file=sys.stderr)
            return 1
        print(f"the server {'was asked to restart' if asked else f'ended with {code}'}; starting it again", flush=True)
    return 0


def _end_group(process_group: int) -> None:
    """End what the child left behind: vLLM's engine processes outlive a killed API server."""
    with suppress(ProcessLookupError):
        os.killpg(process_group, signal.SIGKILL)
