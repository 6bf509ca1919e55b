"""Router replay by hand: what a router is given, what it weighs, what is counted, packed and shared."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function  # noqa: TID251 - the caller
from torch import Tensor

from chord_megatron.backend.router_replay import ChunkRouters, Heard, _LayerChoice, count_routing, listening
from chord_megatron.batching.packing import BatchLayout, build_global_batch
from chord_megatron.batching.routing import pack_routing, routed_live, rows_in_step
from chord_megatron.tracking.step_metrics import router_metrics
from chord_megatron.types import LIVE, MicroBatch, RoutingCounts, TrainingSample
from chord_megatron.weights.architecture import MixtureOfExperts, ModelArchitecture

EXPERTS = MixtureOfExperts(
    num_experts=4,
    experts_per_token=2,
    ffn_hidden_size=8,
    score_function="softmax",
    normalize_top_k=True,
    dense_layers=(0,),
)
ARCH = ModelArchitecture(
    family="qwen3_moe",
    num_layers=3,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=1,
    num_query_groups=1,
    head_dim=8,
    vocab_size=50,
    max_position_embeddings=64,
    rope_theta=1e4,
    norm_eps=1e-6,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_layernorm=False,
    moe=EXPERTS,
)


def make_routers(tp_rank: int = 0, *, is_fused: bool = False) -> ChunkRouters:
    """Of a chunk without layers: the tests ask in their place."""
    config = SimpleNamespace(recompute_granularity=None, moe_router_fusion=is_fused)
    chunk: Any = SimpleNamespace(modules=list, config=config)
    return ChunkRouters(chunk, ARCH, SimpleNamespace(tp_rank=tp_rank, device=torch.device("cpu")))  # type: ignore[arg-type]


def routing(*rows: Any) -> Tensor:
    """[tokens, layers, top k]"""
    return torch.tensor(rows, dtype=torch.int16)


def sample(
    length: int, given: Tensor | None = None, *, is_expert: bool = False, learnt_from: int = 1
) -> TrainingSample:
    mask = torch.arange(length) >= learnt_from
    return TrainingSample(torch.arange(length), mask, is_expert, temperature=1.0, routing=given)


NONE = [[LIVE, LIVE], [LIVE, LIVE]]
GIVEN = routing([[0, 1], [3, 2]], [[2, 0], [3, 1]], NONE)


def micro_batch(*samples: TrainingSample, pad_to_multiple: int = 1) -> MicroBatch:
    layout = BatchLayout(pad_to_multiple=pad_to_multiple)
    (batch,) = build_global_batch(samples, layout, micro_batch_size=max(1, len(samples))).micro_batches
    return batch


# --- packing ----------------------------------------------------------------------------------------------------------


def test_routing_is_packed_as_the_tokens_are():
    """Not shifted by one, as what predicts the next token is; LIVE for expert rows and padding."""
    batch = micro_batch(sample(2, is_expert=True), sample(3, GIVEN), pad_to_multiple=4)
    assert batch.input_ids.tolist() == [0, 1, 0, 1, 2, 0, 0, 0]
    assert batch.routing is not None and batch.routing.dtype == torch.int16
    assert batch.routing.tolist() == [NONE, NONE, *GIVEN.tolist(), NONE, NONE, NONE]


def test_nothing_is_packed_where_no_sample_has_routing():
    assert micro_batch(sample(2), sample(3, is_expert=True)).routing is None
    assert pack_routing([], [4]) is None


def test_a_batch_may_be_routed_live():
    batch = build_global_batch([sample(3, GIVEN)], BatchLayout(), micro_batch_size=1)
    assert batch.micro_batches[0].routing is not None
    assert [each.routing for each in routed_live(batch).micro_batches] == [None]


def test_the_rows_of_a_micro_batch_in_its_step():
    samples = [sample(length) for length in (3, 1, 2, 4)]
    batch = build_global_batch(samples, BatchLayout(dp_rank=1, dp_size=2, pad_to_multiple=4), micro_batch_size=4)
    assert batch.micro_batches[0].sample_indices == (1, 3)
    places, tokens = rows_in_step(batch.micro_batches[0], batch.lengths)
    assert (places.tolist(), tokens.tolist()) == ([3, 6, 7, 8, 9], [0, 1, 2, 3, 4])
    assert [found.tolist() for found in rows_in_step(micro_batch(), ())] == [[], []]


def test_a_prompt_that_is_read_once_has_one_routing():
    """That of the first of its completions; an expert row of the same prompt reads it by itself."""
    prompt, first, second = routing(NONE, [[0, 1], [0, 1]]), routing([[1, 2], [2, 3]]), routing([[3, 0], [3, 1]], NONE)
    other = routing([[2, 3], [2, 3]], [[2, 3], [2, 3]])
    samples = [
        sample(3, torch.cat([prompt, first]), learnt_from=2),
        sample(4, torch.cat([other, second]), learnt_from=2),
        sample(3, is_expert=True, learnt_from=2),
    ]
    batch = build_global_batch(samples, BatchLayout(pad_to_multiple=4), micro_batch_size=3, shares_prompts=True)
    (shared,) = batch.micro_batches
    assert shared.input_ids.tolist() == [0, 1, 2, 2, 3, 0, 1, 2]
    assert shared.routing is not None and shared.is_token.all()
    assert shared.routing.equal(torch.cat([prompt, first, second, routing(NONE, NONE, NONE)]))
    places, tokens = rows_in_step(shared, batch.lengths)
    assert places.tolist() == [*range(10)]
    assert tokens.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7]


def test_a_rank_has_its_chunks_of_each_sequence():
    """Chunks of one token of the first, which the second sequence does not fill: its first and its third are there."""
    long = routing(*([[k, k + 1], [3, 0]] for k in (0, 1, 2)), NONE)
    samples = [sample(4, long), sample(3, GIVEN, is_expert=False)]
    expected = {0: ([0, 3, 4], [0, 1, 2]), 1: ([1, 2, 5, 6], [0, 1, 2, 3])}
    for rank, (places, tokens) in expected.items():
        layout = BatchLayout(cp_rank=rank, cp_size=2)
        batch = build_global_batch(samples, layout, micro_batch_size=2)
        (share,) = batch.micro_batches
        found = rows_in_step(share, batch.lengths)
        assert [values.tolist() for values in found] == [places, tokens]
        assert share.routing is not None
        assert share.routing[found[1]].equal(torch.cat([long, GIVEN])[found[0]])
        assert (share.routing[~share.is_token] == LIVE).all() and int(share.is_token.sum()) == len(places)


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_a_router_is_given_what_was_recorded_and_chooses_elsewhere():
    """The same experts in another order stay in the router's own; the order of the layers is that of the recording."""
    routers, live = make_routers(), torch.tensor([[1, 0], [1, 0], [3, 1]])
    with routers.running(micro_batch(sample(3, GIVEN))):
        assert routers.choose(0, live).tolist() == [[1, 0], [2, 0], [3, 1]]
        assert routers.choose(1, live).tolist() == [[3, 2], [3, 1], [3, 1]]
    load, replayed = routers.take_counts()
    assert load.tolist() == [[2, 2, 1, 1], [0, 2, 1, 3]]
    assert replayed.tolist() == [8, 1 + 2 + 1]  # of 2 tokens in 2 layers: [0, 1] for [1, 0] is no other choice
    assert [counts.sum() for counts in routers.take_counts()] == [0, 0]


def test_without_routing_a_router_chooses_and_padding_is_not_counted():
    routers, live = make_routers(), torch.tensor([[1, 0], [1, 0], [3, 1], [3, 1]])
    with routers.running(micro_batch(sample(3), pad_to_multiple=4)):
        assert routers.choose(1, live) is live
    load, replayed = routers.take_counts()
    assert load.tolist() == [[0, 0, 0, 0], [2, 3, 0, 1]] and replayed.tolist() == [0, 0]


def test_each_rank_of_a_split_sequence_has_its_tokens():
    batch = micro_batch(sample(1, is_expert=True), sample(3, GIVEN), pad_to_multiple=6)
    live = torch.tensor([[0, 1], [0, 1], [0, 1]])
    expected = {0: [[0, 1], [3, 2], [3, 1]], 1: [[0, 1], [0, 1], [0, 1]]}
    loads = {0: [1, 2, 1, 2], 1: [1, 1, 0, 0]}  # the last sequence ends on the second rank, with padding behind it
    for rank, chosen in expected.items():
        routers = make_routers(tp_rank=rank)
        with routers.running(batch):
            assert routers.choose(1, live).tolist() == chosen
        assert routers.take_counts()[0][1].tolist() == loads[rank]


def test_passes_without_a_gradient_are_heard_and_not_counted():
    routers, live = make_routers(), torch.tensor([[1, 0], [1, 0], [3, 1]])
    batch = micro_batch(sample(3, GIVEN))
    with torch.no_grad(), listening([routers]) as heard, routers.running(batch):
        routers.choose(0, live)
    with routers.running(batch):
        routers.choose(0, live)
    assert [(of.batch is batch, of.layer, of.experts.tolist()) for of in heard] == [(True, 0, [[1, 0], [2, 0], [3, 1]])]
    assert isinstance(heard[0], Heard) and heard[0].experts.dtype == torch.int16
    assert routers.take_counts()[1].tolist() == [4, 1]  # of the second pass alone


def test_what_is_drawn_has_no_micro_batch():
    """Its tokens are those of nobody: the routers choose, and nothing is counted."""
    routers, live = make_routers(), torch.tensor([[1, 0]])
    with routers.running(micro_batch(sample(3, GIVEN))):
        pass
    with listening([routers]) as heard:
        assert routers.choose(0, live) is live
    assert heard[0].batch is None and routers.take_counts()[0].sum() == 0


# --- weighing ---------------------------------------------------------------------------------------------------------

LOGITS = [math.log(weight) for weight in (1.0, 2.0, 3.0, 4.0)]
SIGMOIDS = [weight / (1 + weight) for weight in (1.0, 2.0, 3.0, 4.0)]


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [1 / 4, 3 / 4]),
        ({"use_pre_softmax": True}, [1 / 10, 3 / 10]),
        ({"use_pre_softmax": True, "scaling_factor": 2.5}, [1 / 4, 3 / 4]),
        ({"score_function": "sigmoid"}, [0.5 / 1.25, 0.75 / 1.25]),
        # The bias and the groups choose, where the router chooses; they weigh nothing.
        (
            {
                "score_function": "sigmoid",
                "expert_bias": torch.tensor([0.0, 9.0, 0.0, 9.0]),
                "num_groups": 2,
                "group_topk": 1,
                "scaling_factor": 2.0,
            },
            [1.0 / 1.25, 1.5 / 1.25],
        ),
    ],
)
def test_replayed_experts_are_weighed_by_the_router_as_it_is(settings: dict[str, Any], weights: list[float]):
    """The first token is given the experts 0 and 2, the second one chooses. Both have a gradient."""
    routers = make_routers()
    logits = torch.tensor([LOGITS, LOGITS], dtype=torch.float64, requires_grad=True)
    given = routing([[0, 2], [0, 2]], NONE)
    with routers.running(micro_batch(sample(2, given))):
        found, chosen = topk_routing_with_score_function(
            logits, 2, router_replay=_LayerChoice(routers, 0), **{"num_groups": None, **settings}
        )
    assert chosen[0].tolist() == [True, False, True, False]
    assert chosen[1].tolist() != chosen[0].tolist()
    # Megatron-Core takes softmax and sigmoid in float32.
    assert found[0].tolist() == pytest.approx([weights[0], 0, weights[1], 0], rel=1e-6)
    alone, _ = topk_routing_with_score_function(logits, 2, **{"num_groups": None, **settings})
    assert found[1].tolist() == alone[1].tolist()
    (gradient,) = torch.autograd.grad(found[0, 0], logits)
    assert gradient[0, 0] > 0 > gradient[0, 2]
    assert (gradient[0, 1] == 0) == (not settings.get("use_pre_softmax", False))


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_imbalance_and_mismatch_by_hand():
    load = torch.tensor([[4, 0, 0, 4], [1, 2, 3, 2]])
    assert router_metrics(RoutingCounts(load, replayed=16, differing=4)) == {
        "router_imbalance_mean": (4 / 2 + 3 / 2) / 2,
        "router_imbalance_max": 2.0,
        "router_replay_mismatch": 0.25,
    }


def test_nothing_is_measured_where_no_row_is_run():
    idle = RoutingCounts(torch.zeros(2, 4, dtype=torch.int64), replayed=0, differing=0)
    assert set(router_metrics(idle).values()) == {None}


def test_nothing_is_measured_of_dense_models_nor_of_fused_routers_nor_of_live_routing():
    assert set(router_metrics(None).values()) == {None}
    assert count_routing([make_routers(is_fused=True)]) is None  # nobody hears what they choose
    live = router_metrics(RoutingCounts(torch.ones(1, 2, dtype=torch.int64), 0, 0))
    assert live["router_replay_mismatch"] is None and live["router_imbalance_max"] == 1.0
