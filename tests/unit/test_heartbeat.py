"""Who is late, by what the ranks report."""

from __future__ import annotations

import threading

import torch.distributed as dist

from chord_megatron.system.work import Work
from chord_megatron.tracking.heartbeat import Attendance, Heartbeat, Whereabouts


def attendance() -> Attendance:
    return Attendance([0, 1, 2], seconds_until_late=60, now=100)


def test_ranks_that_move_are_never_late():
    account = attendance()
    for beat in range(100):
        for rank in (0, 1, 2):
            account.report(rank, beat, Whereabouts("train", step=beat, moves=beat), now=100 + 10 * beat)
        assert account.late(now=100 + 10 * beat) == []


def test_a_long_phase_of_all_is_nobody_s_fault():
    account = attendance()
    for beat in range(100):
        for rank in (0, 1, 2):
            account.report(rank, beat, Whereabouts("rollout", step=3, moves=40), now=100 + 10 * beat)
    assert account.late(now=1090) == []


def test_a_rank_that_has_not_come_is_named_once():
    account = attendance()
    for beat in range(8):
        for rank in (0, 2):
            account.report(rank, beat, Whereabouts(), now=100 + 10 * beat)
    assert account.late(now=159) == []
    assert account.late(now=160) == ["rank 1 has not come for 60 s: has its node started?"]
    assert account.late(now=170) == []


def test_a_silent_rank_is_named_with_its_phase():
    account = attendance()
    for rank in (0, 1, 2):
        account.report(rank, 0, Whereabouts("reward", step=2, moves=9), now=110)
    for rank in (0, 2):
        account.report(rank, 1, Whereabouts("reward", step=2, moves=9), now=165)
    assert account.late(now=169) == []
    assert account.late(now=170) == [
        "rank 1 has given no sign of life for 60 s, last in reward of step 2: stopped, or its node lost?"
    ]


def test_a_living_rank_that_the_others_wait_for_is_named_again_after_it_has_moved():
    account = attendance()

    def report(late_moves: int, moves: int, now: float) -> list[str]:
        for rank in (0, 1, 2):
            where = Whereabouts("save" if rank == 1 else "log", 4, late_moves if rank == 1 else moves)
            account.report(rank, int(now), where, now)
        return account.late(now)

    assert report(9, 10, now=110) == []
    assert report(9, 10, now=170) == ["rank 1 has been in save of step 4 for 60 s, and the others wait for it"]
    assert report(9, 10, now=180) == []
    assert report(11, 12, now=190) == []
    assert report(11, 12, now=250) == ["rank 1 has been in save of step 4 for 60 s, and the others wait for it"]


def test_phases_nest_and_count():
    where = Whereabouts()
    assert str(where) == "the start"
    where.begin("reading the data")
    assert (str(where), where.moves) == ("reading the data", 1)
    where.step = 0
    with where.within("log"), where.within("step"):
        with where.within("reward"):
            assert (str(where), where.moves) == ("reward of step 0", 4)
        assert (where.phase, where.moves) == ("step", 5)
    with where.within("evaluation"), where.within("rollout"):
        assert str(where) == "evaluation rollout of step 0"


def test_work_is_of_the_phase_that_it_was_begun_in():
    where = Whereabouts()
    with where.within("rollout"):
        where.work.begin("completions", 8)
        where.work.done = 3
        assert where.work == Work("completions", 3, 8)
    assert where.work == Work()


def test_two_ranks_tell_one_another_and_miss_a_third():
    store, said, spoken = dist.HashStore(), [], threading.Event()

    def say(text: str) -> None:
        said.append(text)
        spoken.set()

    options = {"world_size": 3, "seconds_until_late": 0.2, "say": say}
    with Heartbeat(store, Whereabouts(), rank=0, **options), Heartbeat(store, Whereabouts(), rank=1, **options):
        assert spoken.wait(timeout=60)
    assert [text.partition(" for ")[0] for text in said] == ["rank 2 has not come"]
