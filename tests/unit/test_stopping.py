"""SIGTERM and SIGINT, sent to this process."""

from __future__ import annotations

import ast
import os
import signal
from pathlib import Path

import pytest

import chord_megatron
from chord_megatron.system.errors import INTERRUPTIONS
from chord_megatron.training import stopping
from chord_megatron.training.stopping import Stopped, StopSignals

PACKAGE = Path(chord_megatron.__file__).parent


def swallowing(path: Path) -> list[int]:
    """Lines of the handlers of everything that neither raise again nor let interruptions pass before."""
    tries = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Try)]
    return [
        handler.lineno
        for node in tries
        for at, handler in enumerate(node.handlers)
        if (handler.type is None or ast.unparse(handler.type) == "BaseException")
        and not (isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None)
        and not any(ast.unparse(earlier.type or handler) == "INTERRUPTIONS" for earlier in node.handlers[:at])
    ]


def test_nothing_takes_a_signal_for_a_failure():
    """But for the processes of reward functions, in which no signal is raised."""
    found = {str(path.relative_to(PACKAGE)): swallowing(path) for path in sorted(PACKAGE.rglob("*.py"))}
    assert [name for name, lines in found.items() if lines] == ["rewards/worker.py"]
    assert issubclass(Stopped, INTERRUPTIONS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_raised(number: signal.Signals):
    signals, before = StopSignals(), signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, signals.heard():
        os.kill(os.getpid(), number)
    assert stopped.value.number == number == signals.received
    assert signal.getsignal(number) is before


def test_the_same_signal_twice_is_one():
    """While it is cleaned up: Slurm and torchrun's agent both send it."""
    signals = StopSignals()
    with signals.heard():
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_is_noted_and_raised_when_it_comes_again_later(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    signals = StopSignals()
    signals.is_noted_only = True
    with signals.heard():
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 5
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        now[0] += 1
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
    assert signals.received == signal.SIGTERM
    assert capfd.readouterr().err == (
        "SIGTERM: the step is finished and saved first; again after 5 s it ends the run at once\n"
    )
