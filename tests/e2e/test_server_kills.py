"""Servers, ranks, launchers and rewards are killed while a run draws from two real vLLM servers; none of it shows."""

from __future__ import annotations

import random
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import psutil
import pytest
from harness import (
    TIMEOUT_SECONDS,
    alive_after,
    command,
    family,
    files_below,
    finish,
    free_ports,
    kill,
    read_lines,
    read_metrics,
    start,
    succeeded,
    wait_until,
    weight_bytes,
    write_config,
)
from test_kills import Measure, kind_of, moment
from test_vllm_servers import READY_SECONDS, TOKEN

pytestmark = [
    pytest.mark.attack,
    pytest.mark.e2e,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm"),
]

# What the command of a server's processes has in it. One of those of "API server" is its guard.
SERVER_KINDS = {"serve": "chord_megatron.cli", "API server": "vllm_server", "engine": "VLLM::"}
RUN_KINDS = ("command", "rank", "rewards")
ROUNDS = 4  # of a kill of a server's process and one of the run's
_SECONDS_TO_END = 10  # after a command itself
_PHASES = ("weight update", "evaluation", "rollout", "training", "save")
_MOST_STEPS = 4  # in which a phase is waited for: some are short


class Served:
    """A server; started again where its own supervisor is killed."""

    def __init__(self, model: Path, folder: Path) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self._folder = folder
        folder.mkdir()
        self._temporary = tempfile.TemporaryDirectory(prefix="chord-")  # a short name, for vLLM's sockets
        options = ("--port", str(port), "--dtype", "float32", "--max-model-len", "64", "--", "--enforce-eager")
        self._arguments = ("chord_megatron.cli", "serve", model, *options)
        self.start()

    def start(self) -> None:
        """Start it, for the first time or again."""
        environment = {"CHORD_SERVER_TOKEN": TOKEN, "TMPDIR": self._temporary.name}
        self._process = start(*self._arguments, log=self._folder, env=environment)

    def kill(self, kind: str, chance: random.Random) -> list[str]:
        """SIGKILL a process of a kind; who of the others is left but the supervisor, which starts anew.

        vLLM writes a title over the environment of its processes, so that `family` does not find them.
        """
        supervisor = psutil.Process(self._process.pid)
        others = supervisor.children(recursive=True)
        victim = chance.choice([each for each in (supervisor, *others) if SERVER_KINDS[kind] in command(each)])
        victim.send_signal(signal.SIGKILL)
        survivors = [command(each) for each in psutil.wait_procs(others, timeout=TIMEOUT_SECONDS)[1]]
        if victim == supervisor:
            self._process.wait()
            self.start()
        return survivors

    def close(self) -> None:
        """End it."""
        kill(self._process)
        self._temporary.cleanup()


@pytest.fixture
def servers(vllm_assets: Path, tmp_path: Path) -> Iterator[list[Served]]:
    """Two, which start while the run does."""
    started = [Served(vllm_assets / "model", tmp_path / f"server-{number}") for number in range(2)]
    yield started
    for server in started:
        server.close()


@pytest.fixture
def weights() -> Iterator[Path]:
    """A folder in memory for the files of weight updates."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="chord-kills-") as folder:
        yield Path(folder)


def phase(run: Path, weights: Path) -> str:
    """As `moment`; between a save and the first completion, files of weights are there while they are sent."""
    is_sending = any(weights.glob("chord-weights-*/*"))
    return "weight update" if is_sending else moment(run).phase


def is_at(run: Path, weights: Path, steps: int, aim: str) -> bool:
    """Whether a run has come to a phase of any step from that number on; or has missed it in several."""
    reached = moment(run).steps
    return reached >= steps and (phase(run, weights) == aim or reached >= steps + _MOST_STEPS)


def test_a_run_on_servers_that_are_killed_as_it_is_loses_nothing(
    vllm_assets: Path,
    servers: list[Served],
    weights: Path,
    eventful: tuple[str, ...],
    tmp_path: Path,
    measure: Measure,
):
    chance = random.Random(0)
    steps, recorded = 10 * ROUNDS, tmp_path / "rollouts.jsonl"
    overrides = (
        *eventful,
        "rollout.engine=vllm",
        "rollout.vllm_mode=server",
        f"rollout.vllm_servers={[server.url for server in servers]}",
        f"rollout.vllm_server_timeout={READY_SECONDS}",
        f"rollout.weight_transfer_dir={weights}",
        f"train.train_iters={steps}",
    )
    config, run, temporary = write_config(vllm_assets, tmp_path), tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()

    def begin(*more: str) -> subprocess.Popen[str]:
        environment = {"CHORD_SERVER_TOKEN": TOKEN, "TMPDIR": str(temporary)}
        arguments = ("chord_megatron.cli", "train", config, *overrides, *more, "--nproc-per-node", "2")
        return start(*arguments, log=tmp_path, env=environment)

    def count(who: str, when: str, survivors: list[str]) -> None:
        hits.append(f"{who} in {when}")
        measure("kills survived", 1)
        measure("survivors found", len(survivors))
        assert survivors == []

    hits: list[str] = []
    record = f"rollout.record_to={recorded}"
    phases = chance.sample(_PHASES * 2, 2 * ROUNDS)
    kinds = zip(cycle(chance.sample([*SERVER_KINDS], 3)), cycle(chance.sample(RUN_KINDS, 3)))
    for server, (of_server, of_run), _ in zip(cycle(servers), kinds, range(ROUNDS)):
        process, before = begin(record), moment(run).steps
        wait_until(partial(is_at, run, weights, before + 1, phases.pop()), process, READY_SECONDS)
        when = phase(run, weights)
        count(of_server, when, server.kill(of_server, chance))
        wait_until(partial(is_at, run, weights, before + 3, phases.pop()), process, READY_SECONDS)  # without it
        when = phase(run, weights)
        chance.choice([each for each in family(temporary) if kind_of(each) == of_run]).send_signal(signal.SIGKILL)
        assert process.wait(READY_SECONDS) != 0
        count(of_run, when, alive_after(_SECONDS_TO_END, temporary))
    succeeded(finish(begin(record), READY_SECONDS))
    undisturbed = tmp_path / "undisturbed"
    succeeded(finish(begin(f"train.output_dir={undisturbed}"), READY_SECONDS))

    measure("kills on servers", f"{len(hits)} ({', '.join(hits)})")
    versions = [line["policy_version"] for line in read_lines(recorded)]
    assert versions == [step for step in range(steps) for _ in range(8)]
    assert read_metrics(run) == read_metrics(undisturbed)
    assert weight_bytes(run, steps) == weight_bytes(undisturbed, steps)
    assert [*weights.iterdir()] == [*temporary.iterdir()] == []
    assert unfinished(run) == []


def unfinished(run: Path) -> list[str]:
    """Files of writes that were not completed."""
    return [name for name in files_below(run) if ".partial" in name or name.endswith(".tmp")]
