"""A checkpoint is written by the ranks themselves: no other process can be killed, hang, or outlive the run."""

from __future__ import annotations

import multiprocessing.process
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import alive_after, command, family, read_metrics, start, succeeded, train_here, train_on_forks, wait_until

pytestmark = [pytest.mark.attack, pytest.mark.e2e, pytest.mark.distributed]

_SECONDS_TO_END = 10


@pytest.mark.parametrize("in_background", ["false", "true"])
def test_a_save_starts_no_process(in_background: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Megatron-Core's writers are children, for which it waits without a limit, and a server for their answers."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: pytest.fail(f"started {self}"))
    succeeded(train_here(config, "train.train_iters=2", f"train.async_save={in_background}"))
    assert (tmp_path / "run" / "checkpoints" / "step_2" / "__0_0_0.distcp").is_file()


def test_a_link_that_is_not_copied_is_said_once(config: Path, assets: Path, tmp_path: Path):
    """Not by each save, of which the export and the checkpoint copy the model's files."""
    model = shutil.copytree(assets / "model", tmp_path / "model")
    (tmp_path / "notes.txt").write_text("of somebody else")
    (model / "notes.txt").symlink_to(tmp_path / "notes.txt")
    outcome = succeeded(train_here(config, f"model.path={model}", "train.train_iters=2", "train.save_steps=1"))
    sentence = f"{model}/notes.txt is a link to {tmp_path}/notes.txt, outside of the model's folder: not copied\n"
    assert outcome.stdout.count("not copied") == outcome.stdout.count(sentence) == 1
    assert not list((tmp_path / "run").rglob("notes.txt"))


# What is killed: the launcher, or a rank. Always amid a save.
LAYOUTS = {
    "one process": (),
    "one process, in the background": ("train.async_save=true",),
    "two ranks": ("--nproc-per-node", "2", "parallel.tensor_model_parallel_size=2"),
}


@pytest.mark.parametrize(
    ("layout", "kills"),
    [
        ("one process", 3),
        ("two ranks", 2),
        pytest.param("one process, in the background", 15, marks=pytest.mark.slow),
        pytest.param("one process", 15, marks=pytest.mark.slow),
        pytest.param("two ranks", 15, marks=pytest.mark.slow),
    ],
)
def test_nothing_outlives_a_run_that_is_killed_while_it_saves(
    layout: str, kills: int, config: Path, tmp_path: Path, measure: Callable[[str, int], None]
):
    """At random moments of random saves; at the end the run is the undisturbed one."""
    chance = random.Random(f"{layout} {kills}")
    overrides = ("train.save_steps=1", "train.save_total_limit=2", f"train.train_iters={2 * kills + 2}")
    for number in range(kills):
        arguments = ("chord_megatron.cli", "train", config, *overrides, *LAYOUTS[layout])
        process = start(*arguments, log=tmp_path, env={"TMPDIR": str(tmp_path)})
        saved = tmp_path / "run" / "checkpoints" / f"step_{2 * number + chance.choice((1, 2))}"
        partial = saved.with_name(f"{saved.name}.partial")
        wait_until(lambda: partial.exists() or saved.exists(), process)  # noqa: B023 - called here
        time.sleep(chance.uniform(0, 0.1))
        victims = [each for each in family(tmp_path) if "-m chord_megatron" in command(each)]  # not the rewards'
        chance.choice(victims).send_signal(signal.SIGKILL)
        process.wait()
        survivors = alive_after(_SECONDS_TO_END, tmp_path)
        measure("kills survived", 1)
        measure("survivors found", len(survivors))
        assert survivors == []
    run = train_on_forks if layout == "two ranks" else train_here
    options = [option for option in LAYOUTS[layout] if "=" in option]
    succeeded(run(config, *overrides, *options))
    undisturbed = tmp_path / "undisturbed"
    succeeded(run(config, *overrides, *options, f"train.output_dir={undisturbed}"))
    assert read_metrics(tmp_path / "run") == read_metrics(undisturbed)
