"""Checkpoints that are written while training goes on: what a save in the foreground promises, they promise, too."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import forked
import pytest
from harness import (
    Outcome,
    read_lines,
    read_metrics,
    succeeded,
    train_here,
    train_on_forks,
    wait_until,
    weight_bytes,
    write_config,
)

from chord_megatron.backend.checkpoint_writer import ShardedWrite
from chord_megatron.system.background import Background, Check
from chord_megatron.training.trainer import ChordTrainer

pytestmark = [pytest.mark.attack, pytest.mark.e2e, pytest.mark.distributed]

HELD_SAVES = Path(__file__).parent / "held_saves.py"
ASYNC = "train.async_save=true"
STEPS = (2, 4, 6)
SHARDED = ("optimizer.use_distributed_optimizer=true",)


def checkpoint_bytes(run: Path, step: int) -> dict[str, bytes]:
    """Every file of a checkpoint but the list of its parts, which has a number of its own each time."""
    folder = run / "checkpoints" / f"step_{step}"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".metadata"}


def assert_same_run(run: Path, expected: Path) -> None:
    assert read_metrics(run) == read_metrics(expected)
    for step in STEPS:
        assert weight_bytes(run, step) == weight_bytes(expected, step)
        assert checkpoint_bytes(run, step) == checkpoint_bytes(expected, step)
        assert (run / "checkpoints" / f"step_{step}" / ".metadata").is_file()
    assert partial_folders(run) == []


def partial_folders(run: Path) -> list[str]:
    return [str(path.relative_to(run)) for path in run.rglob("*.partial")]


@pytest.fixture(scope="module")
def undisturbed(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with saves in the foreground."""
    root = tmp_path_factory.mktemp("undisturbed")
    succeeded(train_here(write_config(assets, root)))
    return root / "run"


def hold_until_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every save in the background."""
    waited: list[Background] = []
    run, wait = Background._run, Background.wait

    def run_when_waited_for(background: Background) -> None:
        while background not in waited and background._is_wanted:
            time.sleep(0.001)
        run(background)

    def note_and_wait(background: Background) -> Exception | None:
        waited.append(background)
        return wait(background)

    monkeypatch.setattr(Background, "_run", run_when_waited_for)
    monkeypatch.setattr(Background, "wait", note_and_wait)


def test_a_checkpoint_has_the_weights_of_its_step_though_they_change_meanwhile(
    undisturbed: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is written before it is waited for, two steps later; then it is what a save in the foreground wrote."""
    hold_until_waited_for(monkeypatch)
    seen: list[tuple[int, list[str]]] = []
    step = ChordTrainer.step

    def look(trainer: ChordTrainer, number: int) -> object:
        seen.append((number, sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*"))))
        return step(trainer, number)

    monkeypatch.setattr(ChordTrainer, "step", look)
    succeeded(train_here(config, ASYNC))
    first, second = ["step_2.partial"], ["latest", "step_2", "step_4.partial"]
    assert seen == [*enumerate([[], [], first, first, second, second])]
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_run_that_diverges_keeps_the_save_that_goes_on(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It stops in the step of its first save, as one in the foreground does behind it."""
    hold_until_waited_for(monkeypatch)
    step = ChordTrainer.step
    monkeypatch.setattr(ChordTrainer, "step", lambda *arguments: replace(step(*arguments), stepped=False))
    outcome = train_here(config, ASYNC, "train.max_skipped_steps=2")
    assert outcome.code == 2 and "stopped after 2 steps in a row" in outcome.errors[0]
    assert (tmp_path / "run" / "checkpoints" / "step_2" / ".metadata").is_file()
    assert (tmp_path / "run" / "hf" / "step_2" / "model.safetensors").is_file() and partial_folders(tmp_path) == []


def test_ranks_write_what_they_write_in_the_foreground(config: Path, tmp_path: Path):
    succeeded(train_on_forks(config, *SHARDED))
    succeeded(train_on_forks(config, *SHARDED, ASYNC, f"train.output_dir={tmp_path}/async"))
    assert_same_run(tmp_path / "async", tmp_path / "run")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_kill_while_it_is_written_leaves_the_one_before(
    processes: int, config: Path, tmp_path: Path, undisturbed: Path, measure: Callable[[str, int], None]
):
    """Which is pruned when the next one is whole, and not earlier."""
    overrides = (ASYNC, "train.save_total_limit=1", *(SHARDED if processes > 1 else ()))
    arguments = [HELD_SAVES, "4", tmp_path / "never", config, *overrides]
    with (tmp_path / "output").open("w", encoding="utf-8") as output:
        started = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                stdout=output,
                stderr=output,
                text=True,
                env={**os.environ, **forked.ENVIRONMENT, **place},
            )
            for place in forked._places(processes)
        ]
    run = tmp_path / "run"
    metrics, written = run / "metrics.jsonl", run / "checkpoints" / "step_4.partial"
    is_held = lambda: written.is_dir() and any(written.glob("*.distcp")) and len(read_lines(metrics)) >= 5  # noqa: E731
    wait_until(is_held, started[0])  # a step more, while it is written
    for process in started:
        process.kill()
        process.wait()
        measure("kills survived", 1)
    assert (run / "checkpoints" / "latest").read_text() == "step_2\n"
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_2", "step_4.partial"]
    assert sorted(path.name for path in (run / "hf").glob("step_*")) == ["step_2", "step_4.partial"]
    train = train_here if processes == 1 else train_on_forks
    succeeded(train(config, *overrides))
    expected = undisturbed
    if processes > 1:
        expected = tmp_path / "undisturbed"
        succeeded(train(config, *SHARDED, f"train.output_dir={expected}"))
    assert read_metrics(run) == read_metrics(expected)
    assert checkpoint_bytes(run, 6) == checkpoint_bytes(expected, 6)
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_6"]
    assert partial_folders(run) == []


def failing(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The disk is full amid that checkpoint."""
    write = ShardedWrite.write

    def write_until_it_is_full(tensors: ShardedWrite, check: Check) -> None:
        write(tensors, check)
        if tensors._writer.path.name == f"step_{step}.partial":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardedWrite, "write", write_until_it_is_full)


def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(
    config: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        failing(patched, step=4)
        outcome = train_here(config, ASYNC)
    assert outcome.code == 2
    assert outcome.errors == [
        f"error: {run}/checkpoints/step_4 cannot be written (No space left on device); make room, and start the same "
        "command again"
    ]
    assert (run / "checkpoints" / "latest").read_text() == "step_2\n" and partial_folders(run) == []
    succeeded(train_here(config, ASYNC))
    assert_same_run(run, undisturbed)


def signalled(config: Path, *overrides: str, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """A run that SIGTERM meets in its fifth step, while the checkpoint of four is held back until it is waited for."""
    step = ChordTrainer.step

    def raise_at_four(trainer: ChordTrainer, number: int) -> object:
        if number == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, number)

    with monkeypatch.context() as patched:
        hold_until_waited_for(patched)
        patched.setattr(ChordTrainer, "step", raise_at_four)
        return train_here(config, ASYNC, *overrides)


def test_a_signal_ends_the_save_that_goes_on(
    config: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    outcome = signalled(config, monkeypatch=monkeypatch)
    assert outcome.code == 128 + signal.SIGTERM
    assert (run / "checkpoints" / "latest").read_text() == "step_2\n" and partial_folders(run) == []
    succeeded(train_here(config, ASYNC))
    assert_same_run(run, undisturbed)


def test_a_save_on_a_signal_is_waited_for(
    config: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    """And so is the one before it."""
    run = tmp_path / "run"
    outcome = signalled(config, "train.save_on_signal=true", monkeypatch=monkeypatch)
    assert outcome.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM before step 5, with a checkpoint" in outcome.stderr
    assert (run / "checkpoints" / "latest").read_text() == "step_5\n" and partial_folders(run) == []
    assert checkpoint_bytes(run, 4) == checkpoint_bytes(undisturbed, 4)
    succeeded(train_here(config, ASYNC))
    assert_same_run(run, undisturbed)
