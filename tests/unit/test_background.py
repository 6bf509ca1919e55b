"""Files that a thread writes: all of them or an error, and nothing behind the context."""

from __future__ import annotations

import errno
import io
import threading
from pathlib import Path

import pytest

from chord_megatron.system import background
from chord_megatron.system.background import BackgroundFiles


def files_of(folder: Path, *contents: bytes) -> BackgroundFiles:
    files = BackgroundFiles()
    for number, content in enumerate(contents):
        files.add(folder / f"{number}", io.BytesIO(content))
    return files


def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, nothing is forced to the disk."""
    event = threading.Event()
    monkeypatch.setattr(background.os, "fsync", lambda descriptor: event.wait())
    return event


def test_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(background, "_PIECE_BYTES", 3)
    contents = (b"abcdefg", b"", b"abc")
    files = files_of(tmp_path, *contents)
    with files.written():
        assert files.wait() is None and files.is_done
    assert [(tmp_path / f"{number}").read_bytes() for number in range(3)] == [*contents]


def test_it_goes_on_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    event = held(monkeypatch)
    files = files_of(tmp_path, b"abc")
    with files.written():
        assert not files.is_done
        event.set()
        assert files.wait() is None


def test_an_error_is_told(tmp_path: Path):
    files = files_of(tmp_path, b"abc", b"d")
    (tmp_path / "0").mkdir()
    with files.written():
        error = files.wait()
    assert isinstance(error, OSError) and error.errno == errno.EISDIR and files.is_done
    assert not (tmp_path / "1").exists()


def test_an_error_elsewhere_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At the next piece of the file at hand."""
    event = held(monkeypatch)
    files = files_of(tmp_path, b"abc", b"d")
    threading.Timer(0.1, event.set).start()
    with pytest.raises(KeyboardInterrupt), files.written():
        raise KeyboardInterrupt
    assert files.is_done and not (tmp_path / "1").exists()


def test_nothing_to_write_is_done_at_once():
    files = BackgroundFiles()
    with files.written():
        assert files.wait() is None
