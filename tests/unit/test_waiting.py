"""When a run says what it is waiting for, and in which words."""

from __future__ import annotations

import threading

from chord_megatron.system.work import Work
from chord_megatron.tracking.heartbeat import Whereabouts
from chord_megatron.tracking.waiting import Waits, Watch, in_words


def said(waits: Waits, where: Whereabouts, start: int, stop: int) -> list[int]:
    """The seconds at which a line is due, looking each second."""
    return [now for now in range(start, stop) if waits.due(where, now)]


def test_a_long_phase_is_said_after_ten_seconds_and_then_after_twice_as_long():
    assert said(Waits(began=100), Whereabouts("rollout", 3, 7), 100, 200) == [110, 120, 140, 180]


def test_the_start_is_one_wait_through_all_its_phases():
    waits, where = Waits(began=0), Whereabouts()
    lines = []
    for now in range(1, 45):
        if now % 6 == 0:
            where.begin(f"phase {now}")
        lines += [(now, str(where))] if waits.due(where, now) else []
    assert lines == [(10, "phase 6"), (20, "phase 18"), (40, "phase 36")]


def test_a_phase_that_takes_what_it_always_takes_is_not_said_again():
    waits, where = Waits(began=0), Whereabouts("log", 0)
    now, lines = 0, []
    for step in range(4):
        where.step = step
        for phase, seconds in (("rollout", 15), ("train", 8)):
            with where.within(phase):
                lines += [(step, phase, due - now) for due in said(waits, where, now, now + seconds)]
            now += seconds
    assert lines == [(0, "rollout", 10)]
    with where.within("rollout"):  # the fifth hangs
        assert said(waits, where, now, now + 100) == [now + 30, now + 60]


def test_the_words():
    where = Whereabouts()
    where.begin("reading the data")
    assert in_words(where, 12.3) == "reading the data: 12.3 s so far"
    where.step = 3
    with where.within("sync"):
        where.work.begin("waiting for rollout servers (http://a:1: never reached)")
        assert in_words(where, 70) == (
            "sync of step 3, waiting for rollout servers (http://a:1: never reached): 0:01:10 so far"
        )
    with where.within("rollout"):
        where.work.begin("completions", 256)
        assert in_words(where, 10) == "rollout of step 3: 0 of 256 completions (10.0 s so far)"
        where.work.done = 64
        assert in_words(where, 20) == ("rollout of step 3: 64 of 256 completions, 3.2/s, ETA 0:01:00 (20.0 s so far)")
        assert in_words(where, 90, counting=20) == (
            "rollout of step 3: 64 of 256 completions, 3.2/s, ETA 0:01:00 (0:01:30 so far)"
        )


def test_what_was_there_before_is_no_speed():
    where = Whereabouts("reading the data")
    where.work.begin("rows of a.jsonl", 1_000_000)
    where.work.done = where.work.before = 900_000
    assert in_words(where, 10) == "reading the data: 900000 of 1000000 rows of a.jsonl (10.0 s so far)"
    where.work.done += 10_000
    assert in_words(where, 10) == (
        "reading the data: 910000 of 1000000 rows of a.jsonl, 1e+03/s, ETA 0:01:30 (10.0 s so far)"
    )
    where.work.begin("rows of b.jsonl", 9)
    assert where.work == Work("rows of b.jsonl", 0, 9)


def test_a_watch_shows_where_its_process_is_until_it_ends():
    where, shown, seen = Whereabouts("rollout", 2), [], threading.Event()

    def show(work: Work, line: str, is_due: bool) -> None:
        shown.append((work, line.partition(":")[0], is_due))
        seen.set()

    with Watch(where) as watch:
        watch.show = show
        assert seen.wait(timeout=60)
    count = len(shown)
    assert {line for _, line, _ in shown} == {"rollout of step 2"} and shown[0][0] is where.work
    assert not watch._thread.is_alive() and len(shown) == count
