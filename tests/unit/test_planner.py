"""The planner: memory and time by part against sums by hand, the search, the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from architectures import QWEN2_5_7B
from tiny_tokenizer import write_tokenizer
from typer.testing import CliRunner, Result

from chord_megatron.cli import app
from chord_megatron.config import Config, ModelConfig, ParallelConfig, load_config
from chord_megatron.planning.activations import FULLEST_EXPERTS, Kind, backward_bytes, chunks_in_flight, layer_bytes
from chord_megatron.planning.decoding_memory import (
    kv_cache_bytes,
    prefill_bytes,
    rows_at_once,
    rows_of_cohort,
    sampling_bytes,
)
from chord_megatron.planning.flops import head_flops, layer_flops, token_flops
from chord_megatron.planning.gpus import GPUS, Assumptions, Cluster
from chord_megatron.planning.memory import ModelState
from chord_megatron.planning.plan import Plan, make_plan
from chord_megatron.planning.proposals import changes, search, with_fitting_batches
from chord_megatron.planning.rank_memory import RankMemory, rank_memories
from chord_megatron.planning.recomputation import Recomputation
from chord_megatron.planning.rollout_time import server_gpus
from chord_megatron.planning.step_time import StepEstimate, estimate_step
from chord_megatron.planning.traffic import Links, Message, data_parallel_messages, layer_messages, stage_messages
from chord_megatron.planning.workload import Fill, workload
from chord_megatron.weights.architecture import MixtureOfExperts, ModelArchitecture
from chord_megatron.weights.hf_config import read_architecture

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
NUM_LAYER, NUM_7B = 233_057_792, 7_615_616_512  # parameters of a layer of the 7B, and of all of it
TP_2 = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
SHARDED = {"optimizer__use_distributed_optimizer": True}
PP_2 = {"parallel__pipeline_model_parallel_size": 2}
H100 = GPUS["h100"]
BF16_ON_TE = Kind("transformer_engine", itemsize=2, longest=3072)
QWEN3_30B = replace(
    QWEN2_5_7B,
    family="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_attention_heads=32,
    qkv_bias=False,
    qk_layernorm=True,
    moe=MixtureOfExperts(
        num_experts=128, experts_per_token=8, ffn_hidden_size=768, score_function="softmax", normalize_top_k=True
    ),
)


def config_of(**settings: Any) -> Config:
    """`settings` are group__leaf=value."""
    groups: dict[str, dict[str, Any]] = {
        "model": {"path": "model"},
        "data": {"dataset": "prompts.jsonl", "max_prompt_length": 1024},
        "rollout": {"max_completion_length": 2048},
        "chord": {"chord_mu_peak": 0, "chord_mu_valley": 0},
        "train": {"output_dir": "out", "global_batch_size": 256, "train_iters": 12},
    }
    for key, value in settings.items():
        group, leaf = key.split("__")
        groups.setdefault(group, {})[leaf] = value
    return Config.model_validate(groups)


def planned(arch: ModelArchitecture, world_size: int, **settings: Any) -> tuple[Config, Plan]:
    config = config_of(**settings)
    return config, make_plan(config, arch, world_size)


# Memory.


@pytest.mark.parametrize(
    ("parallel", "norms", "whole", "split"), [({}, 28680, 1024, 205936), ({"sp": True}, 28680 / 4, 1024, 205936 / 4)]
)
def test_what_a_layer_of_the_7b_keeps_of_a_token(parallel: dict[str, bool], norms: float, whole: float, split: float):
    """Norms 2 (2 x 3584 x 2 + 4); rotations 4 x 128 x 2; (2 x 3584 + 2 x 512 + 5 x 18944) x 2 and 28 x 4 by heads."""
    tp_4 = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True) if parallel else ParallelConfig()
    found = layer_bytes(QWEN2_5_7B, tp_4, is_moe=False, kind=BF16_ON_TE)
    assert found == norms + whole + split


def test_without_sequence_parallelism_norms_are_whole_on_each_rank():
    tp_4 = ParallelConfig(tensor_model_parallel_size=4)
    found = layer_bytes(QWEN2_5_7B, tp_4, is_moe=False, kind=BF16_ON_TE)
    assert found == 28680 + 1024 + 205936 / 4


def test_what_experts_keep_is_that_of_the_fullest_rank():
    """8 experts a token: 2048 numbers of it and 6 x 768 in the expert, each, at 2 bytes."""
    alone, spread = (
        layer_bytes(QWEN3_30B, ParallelConfig(expert_model_parallel_size=ep), is_moe=True, kind=BF16_ON_TE)
        for ep in (1, 8)
    )
    assert spread - alone == pytest.approx((FULLEST_EXPERTS - 1) * 8 * (2048 + 6 * 768) * 2)


@pytest.mark.parametrize(
    ("stages", "chunks", "micro_batches", "counts"),
    [
        (1, None, 8, [[1]]),
        (4, None, 8, [[4], [3], [2], [1]]),
        (4, None, 2, [[2], [2], [2], [1]]),
        # 2 (p - r - 1) + (v - 1) p + 1 passes, p at a time of each chunk in turn.
        (2, 2, 8, [[3, 2], [2, 1]]),
        (2, 2, 2, [[2, 2], [2, 1]]),
        (4, 2, 8, [[7, 4], [5, 4], [4, 3], [4, 1]]),
    ],
)
def test_micro_batches_under_way(stages: int, chunks: int | None, micro_batches: int, counts: list[list[int]]):
    parallel = ParallelConfig(pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks)
    assert [chunks_in_flight(parallel, stage, micro_batches) for stage in range(stages)] == counts


def test_a_backward_pass_needs_two_widths_two_streams_and_a_weight_gradient():
    """Under sequence parallelism half of each stream, and two whole ones that are gathered."""
    kind = Kind("local", itemsize=4, longest=100)
    alone = backward_bytes(QWEN2_5_7B, ParallelConfig(), is_moe=False, kind=kind, tokens=100)
    assert alone == 4 * (100 * (2 * 18944 + 2 * 3584) + 2 * 18944 * 3584)
    tp_2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    halves = backward_bytes(QWEN2_5_7B, tp_2, is_moe=False, kind=kind, tokens=100)
    assert halves == 4 * (100 * (18944 + 3584 + 2 * 3584) + 18944 * 3584)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_of_two_stages(recompute: bool):
    """The first stage holds two micro-batches, with what it sent on; the last one holds one, and the head."""
    config, plan = planned(QWEN2_5_7B, 2, **PP_2, model__recompute=recompute, train__micro_batch_size=2)
    tokens, hidden = 2 * 3072, 3584 * 2
    first, last = rank_memories(config, QWEN2_5_7B, plan, layers="transformer_engine")
    parallel = config.parallel
    kept = layer_bytes(QWEN2_5_7B, parallel, is_moe=False, kind=BF16_ON_TE)
    backward = backward_bytes(QWEN2_5_7B, parallel, is_moe=False, kind=BF16_ON_TE, tokens=tokens)
    working = backward + tokens * kept * recompute
    of_stage = 14 * (hidden if recompute else kept)
    assert first.activations == tokens * 2 * (of_stage + hidden) + working
    assert last.activations == tokens * of_stage + working
    # Norm and gradient 3 x 3584 x 2 a token; tiles and blocks of 2048 rows in float32; the weight's gradient.
    of_head = 3 * tokens * hidden + 2 * 2048 * (4096 + 3584) * 4 + 152064 * hidden
    assert (first.head, last.head) == (0, of_head)


@pytest.mark.parametrize(
    ("settings", "layers", "at_once"),
    [
        ({"recompute": False}, 14 * 1000, 0),
        ({"recompute": ["mlp"]}, 14 * 1000, 0),
        ({"recompute": True}, 14 * 10, 1),
        ({"recompute": "full", "recompute_num_layers": 4}, 4 * 10, 4),
        ({"recompute": True, "recompute_method": "block", "recompute_num_layers": 4}, 4 * 10 + 10 * 1000, 1),
    ],
)
def test_what_whole_layers_that_are_computed_again_keep(settings: dict[str, Any], layers: int, at_once: int):
    """14 layers of 1000 bytes with an input of 10."""
    again = Recomputation(ModelConfig(path="model", **settings))
    assert (again.kept([1000.0] * 14, 10.0), again.layers_at_once) == (layers, at_once)


def test_the_gradient_of_the_embedding_may_be_the_worst_moment():
    """At the end of a backward pass, where nothing else is left of a short micro-batch."""
    config, plan = planned(
        QWEN2_5_7B, 1, data__max_prompt_length=8, rollout__max_completion_length=8, rollout__engine="replay",
        rollout__replay_from="r.jsonl", model__dtype="float32",
    )  # fmt: skip
    (rank,) = rank_memories(config, QWEN2_5_7B, plan, layers="local")
    assert rank.activations == 152064 * 3584 * 4


def test_context_parallelism_divides_tokens_and_copies_of_the_model():
    """Of a rank's tokens it keeps the same; each rank draws completions of its own; Adam's state is shared by all."""
    config, plan = planned(QWEN2_5_7B, 4, **SHARDED, parallel__context_parallel_size=4)
    (rank,) = rank_memories(config, QWEN2_5_7B, plan, layers="transformer_engine")
    alone, plan_alone = planned(QWEN2_5_7B, 1)
    (whole,) = rank_memories(alone, QWEN2_5_7B, plan_alone, layers="transformer_engine")
    assert (rank.state.weights, rank.state.optimizer) == (2 * NUM_7B, 12 * NUM_7B // 4)
    weight = 2 * 2 * 18944 * 3584
    assert rank.activations - weight == (whole.activations - weight) / 4
    assert rows_at_once(config, plan) == 64


def test_training_and_drawing_share_the_state():
    rank = RankMemory(ModelState(1, 2, 4, 0), 8, 16, kv_cache=32, generation=64, sampler=128, beside_sampler=3)
    assert (rank.training, rank.generating, rank.peak) == (31, 227, 227)
    assert replace(rank, sampler_stays=True).training == 159


def test_memory_of_the_embedded_engine():
    """docs/sizing.md: 29 kB a token and rank at TP 2, and a copy of one layer. 128 rows of 16 prompts."""
    config, plan = planned(QWEN2_5_7B, 2, **TP_2, rollout__max_batch_size=128)
    assert (rows_at_once(config, plan), rows_of_cohort(config, plan)) == (128, 128)
    of_layer = 128 * 3072 * 28672 // 28
    assert kv_cache_bytes(config, QWEN2_5_7B, plan, layers=28, itemsize=2) == 29 * of_layer
    assert sampling_bytes(config, QWEN2_5_7B, plan, itemsize=2) == 128 * 152064 * (4 + 4 + 8 + 8 + 4)
    cut = config.model_copy(update={"rollout": config.rollout.model_copy(update={"top_p": 0.9})})
    assert sampling_bytes(cut, QWEN2_5_7B, plan, itemsize=2) == 128 * 152064 * (4 + 4 + 8 + 3 * 8 + 1)
    of_token = 2 * (3 * 3584 + 5 * 18944 / 2) + 5 * 1024
    assert prefill_bytes(config, QWEN2_5_7B, plan, itemsize=2) == 16 * 1024 * of_token
    few, plan = planned(QWEN2_5_7B, 4, **TP_2, train__global_batch_size=8)
    assert rows_at_once(few, plan) == 4


def test_stages_decode_a_cohort_each():
    config, plan = planned(QWEN2_5_7B, 2, **PP_2, rollout__max_batch_size=128)
    assert (rows_at_once(config, plan), rows_of_cohort(config, plan)) == (128, 64)
    of_layer_and_row = 3072 * 1024 * 2
    assert kv_cache_bytes(config, QWEN2_5_7B, plan, layers=14, itemsize=2) == (14 * 128 + 64) * of_layer_and_row


def test_a_colocated_vllm_takes_its_share():
    rollout = {"rollout__engine": "vllm", "rollout__vllm_mode": "colocate", "rollout__offload_optimizer": True}
    config, plan = planned(QWEN2_5_7B, 1, **rollout)
    (rank,) = rank_memories(config, QWEN2_5_7B, plan, layers="transformer_engine", gpu_bytes=80 * 10**9)
    assert (rank.sampler, rank.kv_cache, rank.beside_sampler) == (32 * 10**9, 0, 2 * NUM_7B)
    assert rank.generation == 512 * 10**6  # the bucket of weights on their way
    assert rank.generating == 2 * NUM_7B + 512 * 10**6 + 32 * 10**9


# Time.


def test_tokens_of_a_step():
    config, plan = planned(
        QWEN2_5_7B, 1, chord__chord_sft_dataset="e.jsonl", chord__chord_sft_max_length=4096,
        chord__chord_sft_global_batch_size=64, chord__chord_mu_peak=0.5, chord__chord_mu_valley=0.5,
        train__micro_batch_size=2,
    )  # fmt: skip
    load = workload(config, plan, Fill(prompt=0.5, completion=0.25, expert=0.5))
    assert (load.longest_row, load.tokens_per_micro_batch, load.micro_batches) == (4096, 8192, 160)
    assert load.tokens == 256 * (512 + 512) + 64 * 2048
    assert load.counted_tokens == 256 * 512 + 64 * 2048
    assert load.mean_row == (256 * 1024**2 + 64 * 2048**2) / load.tokens
    budget = config.model_copy(update={"train": config.train.model_copy(update={"max_tokens_per_micro_batch": 10000})})
    load = workload(budget, plan, Fill(prompt=0.5, completion=0.25, expert=0.5))
    # 320 rows: two of the longest fit, and 10000 / 1228.8 of the mean.
    assert (load.tokens_per_micro_batch, load.most_micro_batches, load.micro_batches) == (10000, 160, 40)
    rollouts = workload(config_of(), plan, Fill())
    assert (rollouts.longest_row, rollouts.expert_rows, rollouts.micro_batches) == (3072, 0, 256)  # mu is 0


def test_experts_of_any_length_are_as_long_as_the_budget_at_most():
    """chord.chord_sft_max_length is not set: the model reads more, but a row that no micro-batch holds ends a run."""
    config, plan = planned(
        QWEN2_5_7B, 1, chord__chord_sft_dataset="e.jsonl", chord__chord_sft_global_batch_size=64,
        chord__chord_mu_peak=0.5, chord__chord_mu_valley=0.5, train__max_tokens_per_micro_batch=4096,
    )  # fmt: skip
    assert plan.expert_max_length > 4096
    load = workload(config, plan, Fill(prompt=0.5, completion=0.25, expert=0.5))
    assert (load.longest_row, load.most_micro_batches) == (4096, 320)
    assert load.tokens == 256 * (512 + 512) + 64 * 2048


def test_operations_of_a_token():
    """Two for each weight; in attention 2 x 128 for each of 28 heads and each token of half a row, twice."""
    assert layer_flops(QWEN2_5_7B, 0) == 2 * NUM_LAYER
    assert layer_flops(QWEN2_5_7B, 0, mean_row=1000) == 2 * NUM_LAYER + 1000 * 28 * 256
    assert token_flops(QWEN2_5_7B) == 28 * 2 * NUM_LAYER
    assert head_flops(QWEN2_5_7B) == 2 * 3584 * 152064
    dense = 2048 * (2 * 4096 + 2 * 512) + 128 * 2048 + 2 * 128 + 2 * 2048
    assert layer_flops(QWEN3_30B, 0) == 2 * (dense + 8 * 3 * 2048 * 768)


def test_a_step_on_one_gpu():
    """Nothing is sent; 2 x 12 + 6 + 2 x 4 bytes a parameter pass through Adam."""
    config, plan = planned(
        QWEN2_5_7B, 1, rollout__engine="replay", rollout__replay_from="r.jsonl", train__micro_batch_size=4
    )
    step = estimate_step(config, QWEN2_5_7B, plan, Cluster(H100, 1, 8), Assumptions())
    tokens = 256 * 1536
    passes = 3 * token_flops(QWEN2_5_7B, 1536) * tokens + 4 * head_flops(QWEN2_5_7B) * 256 * 1024
    assert step.time.compute == pytest.approx(passes / (989e12 * 0.5))
    assert step.time.optimizer == pytest.approx(38 * NUM_7B / (3350e9 * 0.7))
    assert step.time.total == pytest.approx(step.time.compute + step.time.optimizer)
    assert step.messages == []
    assert step.model_flops == pytest.approx(passes - head_flops(QWEN2_5_7B) * 256 * 1024)


def test_states_on_the_host_are_stepped_there():
    """Moments, copy and gradient of half of the parameters, 16 bytes each, twice; 6 bytes of each there and back."""
    half = {"optimizer__optimizer_cpu_offload": True, "optimizer__optimizer_offload_fraction": 0.5, **SHARDED}
    on_device = (12 + 3 + 8) * NUM_7B / (3350e9 * 0.7)
    on_host = (16 + 3) * NUM_7B / 40e9 + 3 * NUM_7B / 25e9
    assert step_of(1, **half).time.optimizer == pytest.approx(on_device + on_host)


def step_of(world_size: int, arch: ModelArchitecture = QWEN2_5_7B, **settings: Any) -> StepEstimate:
    recorded = {"rollout__engine": "replay", "rollout__replay_from": "r.jsonl"}
    config, plan = planned(arch, world_size, **recorded, **settings)
    return estimate_step(config, arch, plan, Cluster(H100, world_size, 8), Assumptions())


def test_the_bubble_of_a_pipeline():
    """256 micro-batches: the slowest stage, which has the head, runs 257; interleaved 256.5."""
    layers = 3 * 14 * layer_flops(QWEN2_5_7B, 0, 1536) * 1536 / (989e12 * 0.5)
    head = 4 * head_flops(QWEN2_5_7B) * 1024 / (989e12 * 0.5)
    for chunks, rounds in ((None, 257), (2, 256.5)):
        time = step_of(2, **PP_2, parallel__virtual_pipeline_model_parallel_size=chunks).time
        hidden = 1536 * 3584 * 2
        sent = 2 * (chunks or 1) * (15e-6 + hidden / (450e9 * 0.8))
        assert time.communication == pytest.approx(256 * sent)
        assert time.compute == pytest.approx(256 * (layers + head / 2))
        whole = time.compute + time.communication + time.bubble
        assert whole == pytest.approx(rounds * (layers + head + sent))


def test_recomputation_takes_another_forward_pass():
    plain, again = (step_of(1, model__recompute=recompute).time.compute for recompute in (False, True))
    forward = token_flops(QWEN2_5_7B, 1536) * 256 * 1536 / (989e12 * 0.5)
    assert again - plain == pytest.approx(forward)


def test_log_probs_that_a_step_needs():
    """Forward passes of the reference, and of the old policy over what the first step of a batch does not find."""
    forward = (token_flops(QWEN2_5_7B, 1536) * 1536 + head_flops(QWEN2_5_7B) * 1024) * 256 / (989e12 * 0.5)
    cases: list[tuple[dict[str, Any], float]] = [
        ({}, 0),
        ({"beta": 0.1}, 1),
        ({"num_iterations": 2}, 0),
        ({"num_iterations": 2, "beta": 0.1}, 1 / 2),
        ({"steps_per_generation": 2}, 1 / 2),
        ({"steps_per_generation": 2, "old_log_probs": "sampler"}, 0),
        ({"steps_per_generation": 2, "beta": 0.1}, 3 / 2),
        ({"beta": 0.1, "kl_in_reward": True}, 2),
        ({"top_entropy_quantile": 0.2}, 1),
    ]
    for settings, passes in cases:
        time = step_of(1, **{f"grpo__{key}": value for key, value in settings.items()}).time
        assert time.log_probs == pytest.approx(passes * forward), settings


def links(gpus: int) -> Links:
    return Links(Cluster(H100, gpus, 8), Assumptions())


def total(messages: list[Message], what: str) -> tuple[float, float]:
    """(bytes, count) of all whose name begins so."""
    chosen = [message for message in messages if message.what.startswith(what)]
    return sum(message.total_bytes for message in chosen), sum(message.count for message in chosen)


def test_messages_of_tensor_parallelism():
    """Half of 1000 x 3584 x 2 bytes each: 2 + 2 forward, 4 + 2 backward; as much again where layers are recomputed."""
    half = 1000 * 3584 * 2 / 2
    for recompute, gathers, scatters in ((False, 4, 2), (True, 6, 4)):
        config = config_of(**TP_2, model__recompute=recompute)
        forward, backward = (
            layer_messages(config, QWEN2_5_7B, links(8), tokens=1000, is_moe=False, backward=backward)
            for backward in (False, True)
        )
        assert total(forward, "all-gather") == total(forward, "reduce-scatter") == (2 * half, 2)
        assert total(backward, "all-gather") == (gathers * half, gathers)
        assert total(backward, "reduce-scatter") == (scatters * half, scatters)
    plain = config_of(parallel__tensor_model_parallel_size=2)
    for backward in (False, True):
        messages = layer_messages(plain, QWEN2_5_7B, links(8), tokens=1000, is_moe=False, backward=backward)
        assert total(messages, "all-reduce") == (4 * half, 2)


def test_messages_of_context_parallelism():
    """Half of the keys and values, 2 x 512 numbers a token; in the backward pass also their gradients."""
    config = config_of(parallel__context_parallel_size=2)
    for backward, count in ((False, 1), (True, 2)):
        messages = layer_messages(config, QWEN2_5_7B, links(8), tokens=1000, is_moe=False, backward=backward)
        assert total(messages, "keys and values") == (count * 1000 * 1024 * 2 / 2, count)


def test_messages_of_experts():
    """8 copies of each token to 8 ranks, 7 of which are others; on 16, what stays in the node of 8 is quicker."""
    for ep, gpus, share, link in ((8, 8, 7 / 8, "NVLink"), (16, 16, 1 / 2, "network")):
        config = config_of(parallel__expert_model_parallel_size=ep)
        messages = layer_messages(config, QWEN3_30B, links(gpus), tokens=1000, is_moe=True, backward=False)
        assert total(messages, "all-to-all") == (2 * 1000 * 8 * FULLEST_EXPERTS * 2048 * 2 * share, 2)
        assert {message.link for message in messages} == {link}


def test_messages_of_a_pipeline():
    config = config_of(**TP_2, **PP_2, parallel__virtual_pipeline_model_parallel_size=2)
    (message,) = stage_messages(config, QWEN2_5_7B, links(16), tokens=1000)
    assert (message.nbytes, message.count, message.link) == (500 * 3584 * 2, 4, "network")


def test_messages_of_data_parallelism():
    """Three quarters of half of the parameters, at 4 bytes and at 2; without the distributed optimizer twice the 4."""
    held = (NUM_7B + 57 * 3584) // 2
    config, plan = planned(QWEN2_5_7B, 8, **TP_2, **SHARDED)
    messages = data_parallel_messages(config, QWEN2_5_7B, links(8), plan)
    assert [(m.what, m.nbytes, m.link) for m in messages] == [
        ("reduce-scatter of gradients", held * 0.75 * 4, "NVLink"),
        ("all-gather of parameters", held * 0.75 * 2, "NVLink"),
    ]
    config, plan = planned(QWEN2_5_7B, 16, **TP_2)
    (message,) = data_parallel_messages(config, QWEN2_5_7B, links(16), plan)
    assert (message.nbytes, message.link) == (held * 0.875 * 2 * 4, "network")


def test_seconds_of_a_message():
    near = links(16).message("", "", 45e6, 1, within_node=True)
    far = links(16).message("", "", 45e6, 10, within_node=False)
    assert near.total_seconds == pytest.approx(15e-6 + 45e6 / (0.8 * 450e9))
    assert far.total_seconds == pytest.approx(10 * (40e-6 + 45e6 / (0.8 * 50e9)))


def test_which_groups_lie_within_a_node():
    cluster = Cluster(H100, 16, 8)
    groups = {(stride, size): cluster.within_node(stride=stride, size=size) for stride in (1, 2) for size in (4, 8)}
    assert groups == {(1, 4): True, (1, 8): True, (2, 4): True, (2, 8): False}
    assert Cluster(H100, 8, 8).within_node(stride=8, size=1)


def test_drawing_with_the_training_weights():
    """32 rows on each of 8 ranks, 16 on average: a token takes the weights and the cache through HBM once."""
    config, plan = planned(QWEN2_5_7B, 8)
    step = estimate_step(config, QWEN2_5_7B, plan, Cluster(H100, 8, 8), Assumptions())
    weights = 28 * NUM_LAYER + 3584 + 3584 * 152064
    cache = 16 * (512 + 512) * 28 * 2 * 4 * 128
    token = 2 * (weights + cache) / (3350e9 * 0.7)
    prefill = 4 * 512 * token_flops(QWEN2_5_7B, 512) / (989e12 * 0.5)
    assert step.time.rollout == pytest.approx(2048 * token + prefill)
    few = config_of(rollout__max_batch_size=16)
    twice = estimate_step(few, QWEN2_5_7B, plan, Cluster(H100, 8, 8), Assumptions()).time.rollout
    assert 1.9 * step.time.rollout < twice < 2 * step.time.rollout


def test_stages_draw_at_the_same_time():
    """Of two, each reads its weights for each of two cohorts, and its half of the cache once."""
    config, plan = planned(QWEN2_5_7B, 2, **PP_2, train__global_batch_size=64)
    cluster = Cluster(H100, 2, 8)
    weights, cache = 28 * NUM_LAYER + 3584 + 3584 * 152064, 32 * (512 + 512) * 28 * 2 * 4 * 128
    token = 2 * (weights + cache / 2) / (3350e9 * 0.7)
    prefill = 8 * 512 * token_flops(QWEN2_5_7B, 512) / (2 * 989e12 * 0.5)
    rollout = estimate_step(config, QWEN2_5_7B, plan, cluster, Assumptions()).time.rollout
    assert rollout == pytest.approx(2048 * token + prefill)


SERVERS = {
    "rollout__engine": "vllm",
    "rollout__vllm_mode": "server",
    "rollout__vllm_servers": ["http://a:8000", "http://b:8000"],
    "rollout__weight_transfer": "broadcast",
    "rollout__weight_transfer_address": "a",
}


def test_drawing_elsewhere():
    """Ahead of time it costs nothing as far as training is longer; the weights pass through one adapter."""
    config, plan = planned(QWEN2_5_7B, 8, **SERVERS)
    cluster = Cluster(H100, 8, 8)
    time = estimate_step(config, QWEN2_5_7B, plan, cluster, Assumptions()).time
    assert time.rollout > 0
    gathered = 15e-6 + 2 * NUM_7B / (450e9 * 0.8)
    assert time.sync == pytest.approx(gathered + 2 * NUM_7B / (50e9 * 0.8))
    ahead = config_of(**SERVERS, rollout__max_staleness=1)
    hidden = estimate_step(ahead, QWEN2_5_7B, plan, cluster, Assumptions()).time
    assert hidden.rollout == max(0.0, time.rollout - (time.total - time.rollout - time.sync - time.optimizer))
    assert server_gpus(config, QWEN2_5_7B, cluster) == 8
    assert server_gpus(config, read_architecture(CONFIGS / "DeepSeek-V3"), cluster) == 64


# The search.


@pytest.mark.parametrize(
    ("settings", "data_parallel_size", "rows", "size"),
    [
        ({"train__micro_batch_size": 4}, 8, 256, 4),
        ({"train__micro_batch_size": 4}, 128, 256, 2),  # 4 x 128 does not divide 256
        ({"train__micro_batch_size": 4}, 512, 512, 1),
        ({"train__micro_batch_size": 6}, 32, 256, 2),
        ({"train__micro_batch_size": 4}, 24, 264, 1),  # the next multiple of 24 and of 8 completions
        ({"train__micro_batch_size": 4, "train__max_tokens_per_micro_batch": 10000}, 24, 256, 4),
        # Where micro-batches change the numbers they stay.
        ({"train__micro_batch_size": 4, "chord__semantics": "trinity"}, 128, 512, 4),
    ],
)
def test_batches_are_made_to_fit(settings: dict[str, Any], data_parallel_size: int, rows: int, size: int):
    train = with_fitting_batches(config_of(**settings), data_parallel_size).train
    assert (train.global_batch_size, train.micro_batch_size) == (rows, size)


def test_everything_that_fits_is_ranked():
    config = config_of(rollout__engine="replay", rollout__replay_from="r.jsonl")
    found = search(config, QWEN2_5_7B, Cluster(H100, 8, 8), Assumptions())
    times = [proposal.step.time.total for proposal in found.proposals]
    assert times == sorted(times)
    assert all(proposal.layout.fullest.peak <= found.usable == 72 * 10**9 for proposal in found.proposals)
    assert all(layout.fullest.peak > found.usable for layout in found.too_large)
    # The fastest that leaves a tenth of what is usable, though others are up to 3% faster.
    roomy = [p for p in found.proposals if p.layout.fullest.peak <= 0.9 * found.usable]
    assert found.best is roomy[0] and found.best.step.time.total <= 1.03 * times[0]
    (refused,) = found.refused
    assert refused.startswith("parallel.tensor_model_parallel_size=8 does not divide the model's 28 attention heads")
    layouts = {proposal.layout.name for proposal in found.proposals}
    assert {"TP 2 x PP 1 x DP 4", "TP 1 x PP 4 x DP 2", "TP 2 x PP 1 x DP 4, recomputation"} <= layouts


def test_a_batch_that_stays_comes_before_one_that_grows():
    config = config_of(train__global_batch_size=8, rollout__engine="replay", rollout__replay_from="r.jsonl")
    found = search(config, QWEN2_5_7B, Cluster(H100, 16, 8), Assumptions())
    flags = [proposal.changed_rows for proposal in found.proposals]
    assert flags == sorted(flags) and set(flags) == {False, True}
    assert found.best.layout.config.train.global_batch_size == 8


def test_keys_that_do_nothing_on_one_rank_stay_as_they_are():
    config = config_of(**SHARDED, parallel__sequence_parallel=True, data__max_prompt_length=64)
    small = replace(QWEN2_5_7B, num_layers=2)
    assert changes(config, search(config, small, Cluster(H100, 1, 8), Assumptions()).best.layout.config) == {}


def test_long_rows_are_cut_over_ranks():
    """Ranks keep at least 4096 tokens of a row of 66,560; without context parallelism fewer rows' tokens fit."""
    config = config_of(
        rollout__engine="replay", rollout__replay_from="r.jsonl", rollout__max_completion_length=65536,
        train__global_batch_size=64,
    )  # fmt: skip
    arch = replace(QWEN2_5_7B, max_position_embeddings=131072)
    found = search(config, arch, Cluster(H100, 32, 8), Assumptions())
    sizes = {proposal.layout.config.parallel.context_parallel_size for proposal in found.proposals}
    assert sizes == {1, 2, 4, 8, 16}
    assert found.best.layout.config.parallel.context_parallel_size > 1
    assert " x CP " in found.best.layout.name


@pytest.mark.parametrize("wanted", [True, False])
def test_an_optimizer_that_must_be_distributed_is_so_wherever_it_is_proposed(wanted: bool):
    config = config_of(
        data__max_prompt_length=14_000,
        rollout__max_completion_length=16_000,
        optimizer__use_precision_aware_optimizer=True,
        optimizer__use_distributed_optimizer=wanted,
    )
    found = search(config, QWEN2_5_7B, Cluster(GPUS["h200"], 8, 8), Assumptions())
    assert all(proposal.layout.config.optimizer.use_distributed_optimizer for proposal in found.proposals)
    refused = sum(count for sentence, count in found.refused.items() if "use_precision_aware_optimizer" in sentence)
    assert (refused > 0) is not wanted  # one rank of each shard: alone where that is not the user's wish


# The command.

ELSEWHERE = ["rollout.engine=vllm", "rollout.vllm_mode=server", "rollout.vllm_servers=['http://10.0.0.9:8000']"]
MODELS: list[tuple[str, int, list[str]]] = [
    ("Qwen2.5-7B", 8, []),
    ("Qwen2.5-32B", 32, ELSEWHERE),
    ("Qwen3-235B-A22B", 128, ELSEWHERE),
    ("DeepSeek-V3", 256, ELSEWHERE),
]
MY_YAML = """\
data: {dataset: prompts.jsonl, max_prompt_length: 1024}
rollout: {num_generations: 8, max_completion_length: 2048}
chord:
  chord_sft_dataset: experts.jsonl
  chord_sft_global_batch_size: 64
  chord_sft_max_length: 3072
optimizer: {lr: 1.0e-6}
train: {output_dir: out, global_batch_size: 256, micro_batch_size: 1, train_iters: 300}
"""


def write_model(folder: Path, model: str) -> Path:
    """A configuration of the model, of which only its sizes and some tokenizer are there."""
    (folder / "model").mkdir()
    shutil.copy(CONFIGS / model / "config.json", folder / "model")
    write_tokenizer(folder / "model")
    config = folder / "my.yaml"
    config.write_text(f"model: {{path: {folder / 'model'}}}\n{MY_YAML}", encoding="utf-8")
    return config


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "400"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize(("model", "gpus", "overrides"), MODELS)
def test_a_proposal_passes_validate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, gpus: int, overrides: list[str]
):
    monkeypatch.chdir(tmp_path)
    config, output = write_model(tmp_path, model), tmp_path / "planned.yaml"
    planned = run("plan", config, *overrides, "--gpus", f"{gpus}", "--gpu", "h100", "--output", output, "--json")
    assert planned.exit_code == 0, planned.stderr
    document = json.loads(planned.stdout)
    validated = run("validate", output, "--nproc-per-node", "8", "--nnodes", f"{gpus // 8}")
    assert validated.exit_code == 0, validated.stderr
    # Nothing but the layout has changed, and it fits.
    changed = changes(load_config(config, overrides), load_config(output))
    assert {key: new for key, (_, new) in changed.items()} == document["changes"]
    assert changed.keys() <= {
        "parallel.tensor_model_parallel_size",
        "parallel.pipeline_model_parallel_size",
        "parallel.virtual_pipeline_model_parallel_size",
        "parallel.pipeline_layout",
        "parallel.expert_model_parallel_size",
        "parallel.context_parallel_size",
        "parallel.sequence_parallel",
        "optimizer.use_distributed_optimizer",
        "model.recompute",
    }
    assert max(stage["training"] for stage in document["proposed"]["bytes_by_stage"]) <= document["usable_bytes"]


@pytest.mark.parametrize("overrides", [[], ["model.recompute=[mlp, core_attn]"]])
def test_the_command_prints_tables(tmp_path: Path, overrides: list[str]):
    config = write_model(tmp_path, "Qwen2.5-7B")
    result = run("plan", config, *overrides, "--nodes", "1", "--gpu", "H200")
    assert result.exit_code == 0, result.stderr
    words = " ".join(result.stdout.split())
    assert "8 x h200 (1 node): 141 GB" in words
    for title in ("Layouts that fit", "Memory of a GPU, GB", "Seconds of a step", "What a GPU sends in a step"):
        assert title in words
    assert "proposed: TP" in words and "computed, not measured" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8", "--gpu", "h1000"], "--gpu 'h1000' is not known; use one of a100, h100"),
        ([], "say how many GPUs there are: --gpus 64, or --nodes 8 with --gpus-per-node 8"),
        (["--gpus", "8", "--nodes", "1"], "say how many GPUs there are"),
        (["--gpus", "12"], "--gpus 12 is not a multiple of --gpus-per-node 8; change one of them"),
        (["--gpus", "1"], "layouts fits 1 x h100: the smallest, TP 1 x PP 1 x DP 1, recomputation, needs "),
        (["rollout.vllm_mode=server", "--gpus", "8"], "rollout.engine=vllm and rollout.vllm_mode"),
        (["--gpus", f"{10**14}"], f"{10**14} GPUs are more than the 1000000 that plan takes; lower --gpus"),
        (["--nodes", "200000"], "1600000 GPUs are more than the 1000000 that plan takes; lower --nodes"),
        (["model.recompute=[moe]", "--gpus", "8"], "model.recompute names moe, but the model has no experts"),
        (["model.recompute_method=block", "--gpus", "8"], "model.recompute_method=block is for model.recompute=full"),
        (["--gpus", "8", "--output", "nowhere/x.yaml"], "--output nowhere/x.yaml: its folder does not exist"),
        (
            [
                "rollout.engine=vllm",
                "rollout.vllm_mode=colocate",
                "rollout.vllm_gpu_memory_utilization=0.1",
                "--gpus",
                "8",
            ],
            "a colocated vLLM needs 15.2 GB of each GPU for its weights, but "
            "rollout.vllm_gpu_memory_utilization=0.1 leaves it 8.0 GB",
        ),
    ],
)
def test_one_sentence_where_nothing_can_be_planned(tmp_path: Path, arguments: list[str], message: str):
    result = run("plan", write_model(tmp_path, "Qwen2.5-7B"), *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_configuration_that_is_missing(tmp_path: Path):
    missing = run("plan", tmp_path / "none.yaml", "--gpus", "8")
    assert (missing.exit_code, missing.stderr.count("\n")) == (2, 1)
    assert missing.stderr.startswith("error: cannot read the configuration ")


@pytest.mark.parametrize("name", ["my.yaml", "model/../my.yaml", "prompts.jsonl"])
def test_no_file_is_overwritten(tmp_path: Path, name: str):
    config, rows = write_model(tmp_path, "Qwen2.5-7B"), tmp_path / "prompts.jsonl"
    rows.write_text("{}\n", encoding="utf-8")
    before = config.read_bytes(), rows.read_bytes()
    result = run("plan", config, "--gpus", "8", "--output", tmp_path / name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: --output {tmp_path / name} is there already; name another file, or remove it\n"
    assert (config.read_bytes(), rows.read_bytes()) == before


def test_validate_says_what_a_process_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = write_model(tmp_path, "Qwen2.5-7B")
    result = run("validate", config, "rollout.engine=replay", "rollout.replay_from=r.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "137.1 GB a process = 15.2 GB weights + 30.5 GB gradients + 91.4 GB optimizer" in result.stdout
    loaded = load_config(config, ["rollout.engine=replay", "rollout.replay_from=r.jsonl"])
    arch = read_architecture(tmp_path / "model")
    (rank,) = rank_memories(loaded, arch, make_plan(loaded, arch, 1), layers="local")
    assert f"{rank.step_in_words} (Megatron-Core's own modules)" in result.stdout
