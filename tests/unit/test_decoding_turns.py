"""The order in which the stages of a pipeline decode: every stage is busy, and what one sends the next one expects."""

from __future__ import annotations

import pytest
import torch

from chord_megatron.backend.cohort import Cohort
from chord_megatron.backend.generation import turn
from chord_megatron.types import SamplingParams


def test_two_stages_of_two_chunks():
    """(cohort, chunk) of each stage in each tick: a token is drawn of cohort 0 in tick 3, of cohort 1 in tick 4."""
    first, second = ([turn(tick, rank, 2, 2) for tick in range(6)] for rank in (0, 1))
    assert first == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 0)]
    assert second == [None, (0, 0), (1, 0), (0, 1), (1, 1), (0, 0)]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_every_stage_is_busy_and_gets_what_the_one_before_it_sent(num_stages: int, num_chunks: int):
    ranks = range(num_stages)
    for tick in range(num_stages - 1, 4 * num_stages * num_chunks):
        here = [turn(tick, rank, num_stages, num_chunks) for rank in ranks]
        assert {cohort for cohort, _ in here} == set(ranks)
        following = [turn(tick + 1, rank, num_stages, num_chunks) for rank in ranks]
        assert following[1:] == here[:-1]
        cohort, chunk = here[-1]
        assert following[0] == (cohort, (chunk + 1) % num_chunks)


def test_a_cohort_knows_how_many_of_its_completions_have_ended():
    """Three rows, of which 7 ends one: the second at once, the first and the third with the second and third token."""
    params = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_completion_length=5, stop_token_ids=(7,))
    cohort = Cohort([[1], [2], [3]], [[0], [1], [2]], params, num_chunks=1, device=torch.device("cpu"))
    ended = []
    for drawn in ([4, 7, 4], [7, 4], [7]):
        cohort.take(torch.tensor(drawn))
        ended.append(cohort.num_ended)
    assert ended == [1, 2, 3]
