"""The pointer to the latest checkpoint, the pruning of old ones, and what marks a run as finished."""

from __future__ import annotations

import os
from pathlib import Path

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
        run_dir.publish(step, keep)
    return run_dir


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_new_run_has_no_latest_step(tmp_path: Path):
    assert RunDir(tmp_path).latest_step() is None
    assert RunDir(tmp_path / "absent").latest_step() is None


def test_the_pointer_follows_the_newest_checkpoint(tmp_path: Path):
    run_dir = saved(tmp_path, 9, 10)
    assert run_dir.latest_step() == 10
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


def test_a_failed_write_leaves_the_old_pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A crash before the rename: the pointer still names the checkpoint that is whole, and nothing was pruned."""
    run_dir = saved(tmp_path, 1)
    run_dir.checkpoint(2).mkdir()

    def crash(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        run_dir.publish(2, keep=1)
    assert run_dir.latest_step() == 1
    assert run_dir.checkpoint(1).is_dir()


@pytest.mark.parametrize("content", ["step_7\n", "step_x\n", "", "7\n", "step_-1\n", "step_²\n"])
def test_a_pointer_that_leads_nowhere_is_an_error(tmp_path: Path, content: str):
    run_dir = saved(tmp_path, 1)
    latest = tmp_path / "checkpoints" / "latest"
    latest.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        run_dir.latest_step()
    assert str(error.value) == (
        f"{latest} names {content.strip()!r}, which is not there; write a step_N that is, or remove it"
    )


def test_finished_is_about_a_number_of_steps(tmp_path: Path):
    run_dir = saved(tmp_path, 6)
    assert not run_dir.is_finished(6)
    run_dir.mark_finished(6)
    assert run_dir.is_finished(6)
    assert not run_dir.is_finished(8)  # raised train_iters: there is more to do


def test_another_run_in_the_directory_is_refused(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    run_dir.refuse_other_run({"train.seed": 1})  # a new run: nothing to compare with
    run_dir.config.write_text("train: {seed: 0}\nmodel: {path: m}\n", encoding="utf-8")
    run_dir.refuse_other_run({"train.seed": 0, "model.path": "m"})
    with pytest.raises(UserError) as error:
        run_dir.refuse_other_run({"model.path": "m", "train.seed": 1})
    assert str(error.value) == (
        f"{tmp_path} holds a run with train.seed=0, but this one has 1; choose another train.output_dir"
    )


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_file_where_the_directory_should_be_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        RunDir(tmp_path / "file" / below).refuse_other_run({"train.seed": 1})
    assert str(error.value) == f"{tmp_path / 'file'} is a file; choose another train.output_dir"


@pytest.mark.parametrize("text", ["", "- a\n", "train: 3\n", "train: {seed: 1\n", "\x00", "a: 1"])
def test_a_configuration_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.config.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        run_dir.refuse_other_run({"train.seed": 1})
    assert str(error.value) == (
        f"{run_dir.config} is not the configuration of a run; remove it, or choose another train.output_dir"
    )


def test_a_damaged_mark_is_of_no_finished_run(tmp_path: Path) -> None:
    run_dir = saved(tmp_path, 6)
    run_dir.mark_finished(6)
    (tmp_path / "checkpoints" / "finished").write_bytes(b"6\xff")
    assert not run_dir.is_finished(6)


def test_publishing_an_earlier_step_removes_the_later_ones(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (10, 22, 30):
        run.checkpoint(step).mkdir(parents=True)
        run.hf(step).mkdir(parents=True)
    run.publish(22, keep=1)  # the run was taken back to step 10, and went on
    assert run.latest_step() == 22
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["step_22"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_22"]
