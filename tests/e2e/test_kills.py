"""Any process of a run is killed at any moment of it, again and again; at its end the run is the undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from harness import (
    TIMEOUT_SECONDS,
    Outcome,
    alive_after,
    command,
    family,
    files_below,
    read_metrics,
    start,
    succeeded,
    train_here,
    train_on_forks,
    wait_until,
    weight_bytes,
)

from chord_megatron.system.files import read_json_lines

pytestmark = [pytest.mark.attack, pytest.mark.e2e, pytest.mark.distributed]

Measure = Callable[[str, float | str], None]

_SECONDS_TO_END = 10  # after the command itself
_LONGEST_START = 6.0  # seconds, about: what a kill during imports is drawn from
_PHASES = ("evaluation", "rollout", "training", "save")  # in the order of a step


class Layout(NamedTuple):
    """How many processes, and who runs them to the end without a launcher: quicker."""

    options: tuple[str, ...]
    overrides: tuple[str, ...]
    finish: Callable[..., Outcome]


LAYOUTS = {
    "one process": Layout((), (), train_here),
    "two ranks": Layout(("--nproc-per-node", "2"), ("parallel.tensor_model_parallel_size=2",), train_on_forks),
}


class Moment(NamedTuple):
    """How far a run has come, by what it has written: the order is that of time."""

    steps: int  # logged and saved
    phase: str

    @property
    def place(self) -> tuple[int, int]:
        return self.steps, _PHASES.index(self.phase)


def moment(run: Path) -> Moment:
    """Where a run is; where it was, of one that has ended. With an evaluation before each step, and a save after it."""
    lines = [*read_json_lines(run / "metrics.jsonl")]
    latest = run / "checkpoints" / "latest"
    saved = int(latest.read_text().removeprefix("step_")) if latest.exists() else 0
    if lines and "loss" in lines[-1]:
        is_saved = saved > lines[-1]["step"]
        return Moment(saved, "evaluation" if is_saved else "save")
    if not lines or lines[-1]["step"] < saved:
        return Moment(saved, "evaluation")
    scored = run.parent / "scored"  # of the evaluation, or of the step that follows it
    is_scored = scored.exists() and scored.stat().st_mtime_ns > (run / "metrics.jsonl").stat().st_mtime_ns
    return Moment(saved, "training" if is_scored else "rollout")


@pytest.fixture(autouse=True)
def load(request: pytest.FixtureRequest) -> Iterator[None]:
    """Beside a slow test, a busy process for each core."""
    count = os.cpu_count() or 1 if request.node.get_closest_marker("slow") else 0
    program = "from chord_megatron.system.processes import end_with_parent as end; end()\nwhile True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(count)]
    yield
    for process in busy:
        process.kill()
        process.wait()


class Attacks:
    """A run that is started and killed, and started again."""

    def __init__(self, command: tuple[str | Path, ...], folder: Path, seed: str, measure: Measure) -> None:
        """`folder`: of the run, which is its folder `run`; `temporary` in it is for its temporary files."""
        self._command, self._folder, self._chance = command, folder, random.Random(seed)
        self._temporary = folder / "temporary"
        self._temporary.mkdir()
        self._measure = measure
        self.hits: Counter[str] = Counter()
        self.victims: Counter[str] = Counter()

    def kill_once(self, phase: str) -> None:
        """Start it, wait for a phase of one of the next two steps (or for its start), and kill any of its processes."""
        run = self._folder / "run"
        before = _written(run)
        saved = moment(run).steps
        process = start(*self._command, log=self._folder, env={"TMPDIR": str(self._temporary)})
        if phase == "start":
            time.sleep(self._chance.uniform(0, _LONGEST_START))
        else:
            aim = Moment(saved + self._chance.choice((0, 1)), phase)
            wait_until(lambda: _written(run) != before and moment(run).place >= aim.place, process)
            time.sleep(self._chance.uniform(0, 0.04))
        victim = self._chance.choice(family(self._temporary))
        kind = kind_of(victim)
        victim.send_signal(signal.SIGKILL)
        since = time.monotonic()
        self.hits[moment(run).phase if _written(run) != before else "start"] += 1
        assert process.wait(TIMEOUT_SECONDS) != 0
        survivors = alive_after(_SECONDS_TO_END, self._temporary)
        self._measure("kills survived", 1)
        self._measure("survivors found", len(survivors))
        assert survivors == []
        if kind != "rewards":  # whose end is noticed when they are asked next
            self._measure("seconds from a kill at any moment to the end of the last process", time.monotonic() - since)
        self.victims[kind] += 1

    def kill(self, kills: int) -> None:
        """All phases in turn, each round in another order."""
        phases: list[str] = []
        for _ in range(kills):
            phases = phases or self._chance.sample(("start", *_PHASES), 1 + len(_PHASES))
            self.kill_once(phases.pop())

    def __str__(self) -> str:
        return f"{self.hits.total()} ({_listed(self.hits)}; of {_listed(self.victims)})"


def _written(run: Path) -> int | None:
    """Changes when a life of a run has begun to write its log."""
    log = run / "metrics.jsonl"
    return log.stat().st_mtime_ns if log.exists() else None


def kind_of(process: psutil.Process) -> str:
    """Which process of a run it is, while it lives."""
    names = {"-m chord_megatron.cli": "command", "-m chord_megatron.train": "rank"}
    return next((kind for name, kind in names.items() if name in command(process)), "rewards")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def names(run: Path) -> set[str]:
    """What a run holds, but what it has set aside: checkpoints that were complete and not yet the latest."""
    return {name for name in files_below(run) if ".set-aside" not in name}


@pytest.mark.parametrize(
    ("layout", "kills"),
    [
        ("one process", 3),
        pytest.param("one process", 30, marks=pytest.mark.slow),
        pytest.param("two ranks", 20, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_as_the_undisturbed_one(
    layout: str, kills: int, config: Path, eventful: tuple[str, ...], tmp_path: Path, measure: Measure
):
    """The launcher, a rank, or the process of the rewards; the slow ones under load."""
    steps = 2 * kills + 4
    how = LAYOUTS[layout]
    overrides = (*eventful, *how.overrides, f"train.train_iters={steps}")
    arguments = ("chord_megatron.cli", "train", config, *overrides, *how.options)
    attacks = Attacks(arguments, tmp_path, f"{layout} {kills}", measure)
    attacks.kill(kills)
    succeeded(how.finish(config, *overrides))
    undisturbed = tmp_path / "undisturbed"
    succeeded(how.finish(config, *overrides, f"train.output_dir={undisturbed}"))

    measure("kills in all phases", f"{layout}: {attacks}")
    assert read_metrics(tmp_path / "run") == read_metrics(undisturbed)
    assert weight_bytes(tmp_path / "run", steps) == weight_bytes(undisturbed, steps)
    assert names(tmp_path / "run") == names(undisturbed)
    assert [*(tmp_path / "temporary").iterdir()] == []
