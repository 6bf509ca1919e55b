"""Two runs on one directory: the second is refused, whoever holds it, however the first ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chord_megatron.system.errors import UserError
from chord_megatron.tracking import run_lock
from chord_megatron.tracking.run_lock import LOCK_FILE, held

pytestmark = pytest.mark.attack

HOLDER = """
import sys, time
from pathlib import Path
from chord_megatron.tracking.run_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats, and the silence after which a run on another host is taken for gone."""
    monkeypatch.setattr(run_lock, "_SECONDS_BETWEEN_BEATS", 0.05)
    monkeypatch.setattr(run_lock, "_SECONDS_OF_SILENCE", 1.0)


def left_by_another_host(run: Path) -> Path:
    run.mkdir()
    lock = run / LOCK_FILE
    lock.write_text(json.dumps({"host": "node7", "process": 4711, "since": "2026-01-02 03:04:05"}))
    return lock


def test_a_second_run_is_refused_by_name(tmp_path: Path, holder: subprocess.Popen[str]):
    before = {path.name for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError) as error, held(tmp_path / "run"):
        pass
    sentence = str(error.value)
    assert sentence.startswith(
        f"{tmp_path / 'run'} is in use by process {holder.pid} on {os.uname().nodename} since 20"
    )
    assert sentence.endswith("; end that run, or choose another train.output_dir")
    assert {path.name for path in (tmp_path / "run").iterdir()} == before == {LOCK_FILE}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_killed_leaves_nothing_that_hinders(
    tmp_path: Path, holder: subprocess.Popen[str], number: signal.Signals
):
    holder.send_signal(number)
    holder.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["process"] == os.getpid()


def test_nothing_is_left_of_it(tmp_path: Path):
    """Nor of the directories that it made, where the run wrote nothing."""
    with held(tmp_path / "runs" / "mine"):
        assert (tmp_path / "runs" / "mine" / LOCK_FILE).exists()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with held(tmp_path / "runs" / "mine"):
        (tmp_path / "runs" / "mine" / "metrics.jsonl").touch()
    assert os.listdir(tmp_path / "runs" / "mine") == ["metrics.jsonl"]


def test_it_is_released_where_the_run_raises(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), held(tmp_path / "run"):
        _ = 1 / 0
    with held(tmp_path / "run"):
        pass


def test_a_child_that_outlives_the_run_does_not_hold_it(tmp_path: Path):
    with held(tmp_path / "run"):
        child = subprocess.Popen(["sleep", "600"])
    with held(tmp_path / "run"):
        pass
    child.kill()
    child.wait()


def test_what_a_silent_run_on_another_host_left_is_taken_over(tmp_path: Path, quick: None):
    left_by_another_host(tmp_path / "run")
    with held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["process"] == os.getpid()


def test_a_run_on_another_host_that_lives_is_refused(tmp_path: Path, quick: None):
    """Where the file system does not tell hosts of each other's locks: by the file's time, which a run moves on."""
    lock = left_by_another_host(tmp_path / "run")
    alive = f"import os, time\nwhile True:\n    os.utime({str(lock)!r})\n    time.sleep(0.05)"
    process = subprocess.Popen([sys.executable, "-c", alive])
    with pytest.raises(UserError) as error, held(tmp_path / "run"):
        pass
    process.kill()
    process.wait()
    assert str(error.value) == (
        f"{tmp_path / 'run'} is in use by process 4711 on node7 since 2026-01-02 03:04:05; "
        "end that run, or choose another train.output_dir"
    )
    assert json.loads(lock.read_text())["host"] == "node7"


def test_a_lock_of_another_host_that_stays_says_how_to_remove_it(tmp_path: Path, quick: None):
    """As after a lost node, until the file server notices."""
    lock = left_by_another_host(tmp_path / "run")
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError) as error, held(tmp_path / "run"):
            pass
    assert str(error.value).endswith(
        f"; it gives no sign of life: if it has ended, remove {lock}, else choose another train.output_dir"
    )


def test_without_locks_of_the_file_system_signs_of_life_decide(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with held(tmp_path / "run"), pytest.raises(UserError, match="is in use by process"), held(tmp_path / "run"):
        pass
    left = left_by_another_host(tmp_path / "other")
    with held(tmp_path / "other"):
        assert json.loads(left.read_text())["process"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3}', "\x00" * 5000])
def test_a_damaged_lock_hinders_nobody(tmp_path: Path, content: str, quick: None):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).write_text(content)
    with held(tmp_path / "run"):
        pass


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(UserError) as error, held(tmp_path):
        pass
    assert str(error.value) == f"train.output_dir {tmp_path} cannot be written: Permission denied"


def test_a_file_in_its_place_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    sentence = f"{tmp_path / 'file'} is a file; choose another train.output_dir"
    with pytest.raises(UserError, match=sentence), held(tmp_path / "file" / "run"):
        pass
