"""Completions that ranks drew become the samples of a whole request on every rank."""

from __future__ import annotations

import math

import pytest
import thread_group
import torch

from chord_megatron.ops import collectives
from chord_megatron.ops.collectives import all_gather_ragged
from chord_megatron.rollout.recorded_routing import RoutingForm
from chord_megatron.rollout.samples import Completion, completion, share_samples
from chord_megatron.rollout.servers.rollout import _completion as served_completion
from chord_megatron.types import Prompt, RolloutRequest, SamplingParams

PROMPTS = (Prompt(7, "", (1, 2), ""), Prompt(9, "", (3,), ""))
REQUEST = RolloutRequest(PROMPTS, SamplingParams(stop_token_ids=(99,)), num_generations=2, step=4, policy_version=3)
COMPLETIONS = (
    completion(0, [10, 99], [-0.5, -0.25]),
    completion(1, [11, 12, 13], [-1.0, -2.0, -3.0]),
    completion(2, [], []),
    completion(3, [99], [-0.125]),
)


@pytest.fixture(autouse=True)
def ranks_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "dist", thread_group)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_ragged_tensors_come_in_order_of_the_ranks(dtype: torch.dtype):
    group = thread_group.Group(3)
    own = [torch.tensor(values, dtype=dtype) for values in ([1, 2, 3], [], [4])]
    for gathered in group.run(lambda: all_gather_ragged(own[group.rank()], group)):
        assert [share.tolist() for share in gathered] == [[1, 2, 3], [], [4]]
        assert all(share.dtype == dtype for share in gathered)


def test_nothing_is_gathered_of_nothing():
    group = thread_group.Group(2)
    for gathered in group.run(lambda: all_gather_ragged(torch.empty(0), group)):
        assert [share.tolist() for share in gathered] == [[], []]


# Who drew what: in turn, all by one rank as with servers, and a rank that drew nothing between others.
@pytest.mark.parametrize("places", [((0, 2), (1, 3)), ((), (0, 1, 2, 3)), ((3, 0), (), (2, 1))])
def test_every_rank_has_all_samples_in_order(places: tuple[tuple[int, ...], ...]):
    group = thread_group.Group(len(places))
    mine: list[list[Completion]] = [[COMPLETIONS[place] for place in of_rank] for of_rank in places]
    for samples in group.run(lambda: share_samples(REQUEST, mine[group.rank()], group, torch.device("cpu"))):
        assert [(sample.prompt_id, sample.sample_index) for sample in samples] == [(7, 0), (7, 1), (9, 2), (9, 3)]
        assert [sample.tokens.tolist() for sample in samples] == [[1, 2, 10, 99], [1, 2, 11, 12, 13], [3], [3, 99]]
        assert [sample.response_mask.tolist() for sample in samples] == [
            [False, False, True, True],
            [False, False, True, True, True],
            [False],
            [False, True],
        ]
        assert [sample.rollout_log_probs.tolist() for sample in samples] == [
            [0.0, 0.0, -0.5, -0.25],
            [0.0, 0.0, -1.0, -2.0, -3.0],
            [0.0],
            [0.0, -0.125],
        ]
        assert [sample.response_tokens for sample in samples] == [[10, 99], [11, 12, 13], [], [99]]
        assert [sample.finish_reason for sample in samples] == ["stop", "length", "length", "stop"]
        assert {sample.policy_version for sample in samples} == {3}
        for sample in samples:
            assert sample.tokens.dtype == torch.int32 and sample.rollout_log_probs.dtype == torch.float32


@pytest.mark.parametrize("places", [((0, 2), (1, 3)), ((), (0, 1, 2, 3)), ((3, 0), (), (2, 1))])
def test_the_routing_of_a_completion_goes_with_it(places: tuple[tuple[int, ...], ...]):
    """Numbers that need both bytes, and LIVE; of prompt and completion; also where a rank drew nothing."""
    form = RoutingForm(num_layers=3, top_k=2, num_experts=512)
    generator = torch.Generator().manual_seed(0)
    lengths = [len(prompt.tokens) + len(drawn.tokens) for prompt, drawn in zip(REQUEST.repeated, COMPLETIONS)]
    rows = [torch.randint(-1, 512, (n, 3, 2), generator=generator, dtype=torch.int16) for n in lengths]
    group = thread_group.Group(len(places))
    mine = [[COMPLETIONS[place]._replace(routing=rows[place]) for place in of_rank] for of_rank in places]
    device = torch.device("cpu")
    for samples in group.run(lambda: share_samples(REQUEST, mine[group.rank()], group, device, routing=form)):
        assert [sample.tokens.tolist() for sample in samples] == [[1, 2, 10, 99], [1, 2, 11, 12, 13], [3], [3, 99]]
        for sample, row in zip(samples, rows, strict=True):
            assert sample.routing is not None and sample.routing.dtype == torch.int16 and sample.routing.equal(row)


def test_a_completion_that_nobody_drew_is_an_error():
    group = thread_group.Group(1)
    with pytest.raises(ValueError, match="shorter"):
        group.run(lambda: share_samples(REQUEST, COMPLETIONS[:3], group, torch.device("cpu")))


@pytest.mark.parametrize("value", [None, -9999.0, math.nan, -math.inf])
def test_what_a_server_has_no_number_for_is_nan(value: float | None):
    """vLLM's server writes -9999 for NaN and -inf; JSON's own way is null."""
    choice = {"token_ids": [10, 99], "logprobs": {"content": [{"logprob": value}, {"logprob": -0.5}]}}
    drawn = served_completion(2, choice)
    assert drawn.place == 2 and drawn.tokens.tolist() == [10, 99]
    assert not drawn.log_probs[0].isfinite() and drawn.log_probs[1] == -0.5
