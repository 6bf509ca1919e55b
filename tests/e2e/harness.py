"""Starting runs, and reading what they left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest
import yaml
from forked import Outcome
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from chord_megatron.cli import app

TIMEOUT_SECONDS = 240
# What differs between two identical runs.
_MEASURED = ("time_", "tokens_per_second", "peak_memory_bytes")


def write_config(assets: Path, directory: Path) -> Path:
    """A configuration over `assets` whose run goes to directory/run: 6 steps of 8 completions and 6 expert rows."""
    config = {
        "model": {"path": str(assets / "model"), "dtype": "float32"},
        "data": {"dataset": str(assets / "prompts.jsonl"), "max_prompt_length": 48},
        "rewards": {
            "reward_funcs": [f"{assets / 'rewards.py'}:letters"],
            "environment": ["HOLD_AT_CALL"],
            "timeout_seconds": 3600,  # of a function that waits for a test
        },
        "rollout": {"num_generations": 4, "max_completion_length": 8},
        "chord": {
            "chord_sft_dataset": str(assets / "experts.jsonl"),
            "chord_sft_global_batch_size": 6,
            "chord_sft_max_length": 64,
        },
        "optimizer": {"lr": 1e-3},
        "train": {
            "output_dir": str(directory / "run"),
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "train_iters": 6,
            "save_steps": 2,
        },
        "tracking": {"report_to": []},
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def free_ports(count: int) -> list[int]:
    """Ports of the loopback device at which nobody listens.

    They lie below those that the system gives to connections, one of which would take such a port while a server
    still imports what it needs.
    """
    lowest_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    free: list[int] = []
    while len(free) < count:
        port = random.randrange(10_000, lowest_given)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            free = [*dict.fromkeys([*free, port])]
    return free


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train_here(config: Path, *overrides: str) -> Outcome:
    """`chord-megatron train` on one process, in this one: imports take longer than such a run."""
    return run_here("train", config, *overrides)


def run_here(command: str, config: Path, *overrides: str) -> Outcome:
    """Another command so."""
    result = CliRunner().invoke(app, [command, str(config), *overrides])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def start(*arguments: str | Path, env: dict[str, str] | None = None, log: Path | None = None) -> subprocess.Popen[str]:
    """Start `python -m ARGUMENTS` in a process group of its own; what it prints goes to log/output, or to pipes."""
    output = None if log is None else (log / "output").open("w", encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        stdout=output or subprocess.PIPE,
        stderr=output or subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **forked.ENVIRONMENT, **(env or {})},
    )


def train_on_two(config: Path, *overrides: str) -> Outcome:
    """`chord-megatron train --nproc-per-node 2`, to its end."""
    return finish(start("chord_megatron.cli", "train", config, *overrides, "--nproc-per-node", "2"))


def train_on_forks(config: Path, *overrides: str) -> Outcome:
    """What torchrun would run in two processes, without its launcher and the time to import."""
    return forked.run("chord_megatron.train", config, *overrides, processes=2, timeout_seconds=TIMEOUT_SECONDS)


def finish(process: subprocess.Popen[str], seconds: float = TIMEOUT_SECONDS) -> Outcome:
    """Wait for a command; one that hangs is killed and fails the test."""
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        pytest.fail(f"no end after {seconds} s: {(process.communicate()[1] or '')[-2000:]}")
    return Outcome(process.returncode, stdout or "", stderr or "")


def succeeded(outcome: Outcome) -> Outcome:
    """The same, of a command that must succeed."""
    assert outcome.code == 0, outcome.stderr[-2000:]
    return outcome


def kill(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """SIGKILL the command's process group; returns those of its descendants that live on, which are killed too."""
    descendants = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while (alive := [child for child in descendants if _lives(child)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in alive:
        child.kill()
    return alive


def command(process: psutil.Process) -> str:
    """What it was started as; nothing of one that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def family(folder: Path) -> list[psutil.Process]:
    """All that were started with this folder for temporary files, by whomever, and in whatever session they are.

    Every process that a run starts inherits it, also the rewards', whose environment is cleaned.
    """
    return [each for each in psutil.process_iter() if _temporary_folder(each) == str(folder)]


def _temporary_folder(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("TMPDIR")
    except psutil.Error:  # somebody else's, or it has ended
        return None


def alive_after(seconds: float, folder: Path) -> list[str]:
    """Of a family those that do not end within that time, described and then killed."""
    deadline = time.monotonic() + seconds
    while (alive := family(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    described = [f"{each.pid}: {command(each)}" for each in alive]
    for each in alive:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    return described


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = TIMEOUT_SECONDS) -> None:
    """Wait for a condition while a command runs; a command that ends first fails the test."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            if process.poll() is None:
                kill(process)
            pytest.fail(f"ended or hung before its time: {(process.communicate()[1] or '')[-2000:]}")
        time.sleep(0.01)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what is measured rather than computed."""
    lines = read_lines(run_dir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith(_MEASURED)} for line in lines]


def read_state(run_dir: Path, step: int) -> dict[str, Any]:
    """The cursors and counters in a checkpoint."""
    text = (run_dir / "checkpoints" / f"step_{step}" / "state.json").read_text(encoding="utf-8")
    return json.loads(text)["state"]


def weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    """The exported weights after `step` steps."""
    return load_file(run_dir / "hf" / f"step_{step}" / "model.safetensors")


def weight_bytes(run_dir: Path, step: int) -> bytes:
    """The same as a file."""
    return (run_dir / "hf" / f"step_{step}" / "model.safetensors").read_bytes()


def files_below(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file."""
    return {
        str(path.relative_to(directory)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
