"""Files and folders that appear complete or not at all. What new_directory refuses: test_megatron_checkpoint.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from chord_megatron.system.atomic import atomic_write, partial_path, replaced_directory


def test_a_directory_takes_the_place_of_an_earlier_one_when_it_is_complete(tmp_path: Path):
    target = tmp_path / "runs" / "step_1"
    partial_path(target).mkdir(parents=True)
    (partial_path(target) / "torn").touch()  # a killed process left it
    for text in ("first", "second"):
        with replaced_directory(target) as folder:
            assert folder == partial_path(target) and list(folder.iterdir()) == []
            (folder / text).touch()
            assert not (target / text).exists()
        assert [path.name for path in target.iterdir()] == [text]
        assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_earlier_directory(tmp_path: Path, error: type[BaseException]):
    target = tmp_path / "step_1"
    target.mkdir()
    with pytest.raises(error), replaced_directory(target) as folder:
        (folder / "file").touch()
        raise error
    assert list(tmp_path.iterdir()) == [target] and list(target.iterdir()) == []


def test_an_interrupt_leaves_the_earlier_file(tmp_path: Path):
    def chunks():
        yield b"new"
        raise KeyboardInterrupt

    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "file", chunks())
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]
