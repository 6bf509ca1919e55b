"""Work of a thread: all of it or an error, and nothing behind the context."""

from __future__ import annotations

import threading

import pytest

from chord_megatron.system.background import Background, Check


def test_it_goes_on_meanwhile_and_is_waited_for():
    done: list[int] = []
    event = threading.Event()

    def work(check: Check) -> None:
        for number in range(3):
            check()
            event.wait()
            done.append(number)

    background = Background(work)
    with background.running():
        assert not background.is_done and done == []
        event.set()
        assert background.wait() is None and background.is_done
    assert done == [0, 1, 2]


def test_nobody_has_to_wait():
    done: list[int] = []
    with Background(lambda check: done.append(1)).running():
        pass
    assert done == [1]


def test_an_error_is_told():
    def work(check: Check) -> None:
        raise OSError("full")

    background = Background(work)
    with background.running():
        error = background.wait()
    assert isinstance(error, OSError) and str(error) == "full" and background.is_done


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_ends_it_at_its_next_check(interruption: type[BaseException]):
    done: list[int] = []
    is_within, event = threading.Event(), threading.Event()

    def work(check: Check) -> None:
        for number in range(3):
            check()
            is_within.set()
            event.wait()
            done.append(number)

    background = Background(work)
    with pytest.raises(interruption), background.running():
        is_within.wait()
        threading.Timer(0.1, event.set).start()
        raise interruption
    assert background.is_done and done == [0]
