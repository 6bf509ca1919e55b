"""The pointer to the latest checkpoint, the pruning of old ones, and what marks a run as finished."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from chord_megatron.system.errors import UserError
from chord_megatron.tracking.run_dir import RunDir


def saved(path: Path, *steps: int, keep: int | None = None) -> RunDir:
    """A run directory after checkpoints at `steps`."""
    run_dir = RunDir(path)
    for step in steps:
        for directory in (run_dir.checkpoint(step), run_dir.hf(step)):
            directory.mkdir(parents=True)
            (directory / "weights").write_text(str(step), encoding="utf-8")
        complete(run_dir.checkpoint(step))
        run_dir.publish(step, keep)
    return run_dir


def complete(checkpoint: Path) -> Path:
    """What every complete checkpoint has."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    for name in (".metadata", "state.json"):
        (checkpoint / name).touch()
    return checkpoint


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_new_run_has_nothing_to_resume_from(tmp_path: Path):
    assert RunDir(tmp_path).resume_step() is None
    assert RunDir(tmp_path / "absent").resume_step() is None


def test_the_pointer_follows_the_newest_checkpoint(tmp_path: Path):
    run_dir = saved(tmp_path, 9, 10)
    assert run_dir.resume_step() == 10
    assert names(tmp_path / "checkpoints") == {"step_9", "step_10", "latest"}  # no temporary file stays
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_10\n"


def test_pruning_keeps_the_newest_by_number(tmp_path: Path):
    saved(tmp_path, 8, 9, 10, 11, keep=2)  # as text, 9 sorts after 10
    assert names(tmp_path / "checkpoints") == {"step_10", "step_11", "latest"}
    assert names(tmp_path / "hf") == {"step_10", "step_11"}


def test_pruning_leaves_what_it_does_not_know(tmp_path: Path):
    run_dir = saved(tmp_path, 1)
    others = ("step_2.partial", "step_best", "step_best3", "notes_3")
    for name in others:
        (tmp_path / "checkpoints" / name).mkdir()
    run_dir.hf(1).joinpath("weights").unlink()
    run_dir.hf(1).rmdir()  # removed by the user
    run_dir.checkpoint(4).mkdir()
    run_dir.publish(4, keep=1)
    assert names(tmp_path / "checkpoints") == {"step_4", "latest", *others}


def test_what_cannot_be_removed_is_said_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_dir = saved(tmp_path, 1, 2)
    run_dir.hf(1).joinpath("weights").unlink()
    remove = os.rmdir

    def refuse(path: str, **options: int) -> None:
        if "step_1" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        remove(path, **options)

    monkeypatch.setattr(os, "rmdir", refuse)
    complete(run_dir.checkpoint(3))
    assert run_dir.publish(3, keep=1) == [
        f"{folder} cannot be removed (Permission denied) and stays; remove it yourself"
        for folder in (run_dir.hf(1), run_dir.checkpoint(1))
    ]
    assert names(tmp_path / "checkpoints") == {"step_1", "step_3", "latest"}
    assert run_dir.resume_step() == 3


def test_a_failed_write_leaves_the_old_pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A crash before the rename: the pointer still names the checkpoint that is whole, and nothing was pruned."""
    run_dir = saved(tmp_path, 1)
    run_dir.checkpoint(2).mkdir()

    def crash(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        run_dir.publish(2, keep=1)
    assert run_dir.resume_step() == 1
    assert run_dir.checkpoint(1).is_dir()


@pytest.mark.parametrize("content", ["step_7\n", "step_x\n", "", "7\n", "step_-1\n", "step_²\n"])
def test_a_pointer_that_leads_nowhere_is_an_error(tmp_path: Path, content: str):
    run_dir = saved(tmp_path, 1)
    latest = tmp_path / "checkpoints" / "latest"
    latest.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        run_dir.resume_step()
    assert str(error.value) == (
        f"{latest} names {content.strip()!r}, which is not there; write the step to go on with into it, one of step_1"
    )
    (tmp_path / "checkpoints" / "step_1" / "state.json").unlink()
    with pytest.raises(UserError) as error:
        run_dir.resume_step()
    assert str(error.value) == (
        f"{latest} names {content.strip()!r}, which is not there, and no complete checkpoint is; restore one, or "
        "choose another train.output_dir"
    )


def test_without_a_pointer_the_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    run_dir = saved(tmp_path, 2, 4, 10)
    (tmp_path / "checkpoints" / "latest").unlink()
    (tmp_path / "checkpoints" / "step_12.partial").mkdir()
    assert run_dir.resume_step() == 10
    (run_dir.checkpoint(10) / ".metadata").unlink()
    assert run_dir.resume_step() == 4


@pytest.mark.parametrize("left", ["checkpoints/step_4", "hf/step_4"])
def test_what_cannot_be_resumed_from_is_no_new_run_either(tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir(parents=True)
    with pytest.raises(UserError) as error:
        RunDir(tmp_path).resume_step()
    assert str(error.value) == (
        f"{tmp_path} holds {left} and no complete checkpoint; restore one, or choose another train.output_dir"
    )


def test_what_a_killed_first_save_leaves_is_a_new_run(tmp_path: Path) -> None:
    for name in ("checkpoints/step_4.partial", "hf/step_4.partial"):
        (tmp_path / name).mkdir(parents=True)
    assert RunDir(tmp_path).resume_step() is None


@pytest.mark.parametrize("name", ["checkpoints/latest", "checkpoints/finished", "config.yaml"])
def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    run_dir = saved(tmp_path, 1)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError) as error:
        run_dir.resume_step()
        run_dir.ending(1, {})
        run_dir.settings()
    assert str(error.value) == f"{tmp_path / name} cannot be read (Is a directory); remove it"


def test_finished_is_about_a_number_of_steps(tmp_path: Path):
    run_dir = saved(tmp_path, 6)
    assert not run_dir.ending(6, {})
    run_dir.mark_finished(6)
    assert run_dir.ending(6, {})
    assert not run_dir.ending(8, {})  # raised train_iters: there is more to do


def test_the_settings_of_a_run(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.settings() == {}
    run_dir.config.write_text("train: {seed: 0, save_steps: null}\nmodel: {path: m}\n", encoding="utf-8")
    assert run_dir.settings() == {"train.seed": 0, "train.save_steps": None, "model.path": "m"}


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_file_where_the_directory_should_be_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        RunDir(tmp_path / "file" / below).refuse_unusable()
    assert str(error.value) == f"{tmp_path / 'file'} is a file; choose another train.output_dir"


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_directory_that_cannot_be_written_is_named(
    tmp_path: Path, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunDir(tmp_path / below).refuse_unusable()
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK | os.X_OK))
    with pytest.raises(UserError) as error:
        RunDir(tmp_path / below).refuse_unusable()
    assert str(error.value) == f"{tmp_path} cannot be written to; choose another train.output_dir"


@pytest.mark.parametrize(
    "text", ["", "- a\n", "train: 3\n", "train: {seed: 1\n", "\x00", "a: 1", "train: {1: {}}", "{}: {a: 1}"]
)
def test_a_configuration_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.config.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        run_dir.settings()
    assert str(error.value) == (
        f"{run_dir.config} is not the configuration of a run; restore it, or choose another train.output_dir"
    )


def test_a_damaged_mark_is_of_no_finished_run(tmp_path: Path) -> None:
    run_dir = saved(tmp_path, 6)
    run_dir.mark_finished(6)
    (tmp_path / "checkpoints" / "finished").write_bytes(b"6\xff")
    assert not run_dir.ending(6, {})


def test_a_run_removes_the_oldest_beyond_its_limit_and_nothing_newer(tmp_path: Path) -> None:
    run = saved(tmp_path, 10, 22, 30)
    run.publish(22, keep=1)
    assert run.resume_step() == 22
    assert names(tmp_path / "checkpoints") == {"latest", "step_22", "step_30"}
    assert names(tmp_path / "hf") == {"step_22", "step_30"}


def test_what_is_newer_than_the_step_resumed_from_is_set_aside(tmp_path: Path) -> None:
    """A run taken back to step 10, twice: its own checkpoints take the names of others, which stay."""
    run = saved(tmp_path, 10, 22)
    (run.hf(22) / "weights").rename(run.hf(22) / "first")
    (tmp_path / "metrics.jsonl").write_text("lines", encoding="utf-8")
    moved = ["checkpoints/step_22.set-aside", "hf/step_22.set-aside", "metrics.jsonl.set-aside"]
    assert run.set_aside(10) == moved
    for directory in (complete(run.checkpoint(22)), run.hf(22)):
        directory.mkdir(parents=True, exist_ok=True)
    run.publish(22, keep=1)
    assert run.set_aside(10) == [f"{name}-2" for name in moved]
    assert names(tmp_path / "hf") == {"step_22.set-aside", "step_22.set-aside-2"}
    assert names(tmp_path / "hf" / "step_22.set-aside") == {"first"}
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "metrics.jsonl.set-aside").read_text() == "lines"
    assert run.set_aside(10) == []


def test_pruning_that_is_killed_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After any of its removals: no export outlives its checkpoint, by which the next pruning finds both."""
    removals = shutil.rmtree

    def kill(path: Path, **options: Any) -> None:
        removals(path, **options)
        raise KeyboardInterrupt

    run_dir = saved(tmp_path, 1, 2)
    monkeypatch.setattr(shutil, "rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        run_dir.publish(2, keep=1)
    monkeypatch.undo()
    saved(tmp_path, 3, keep=1)
    assert names(tmp_path / "checkpoints") == {"step_3", "latest"}
    assert names(tmp_path / "hf") == {"step_3"}
