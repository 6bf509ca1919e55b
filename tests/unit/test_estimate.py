"""Bytes in memory and on disk of models whose numbers of parameters are known."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import QWEN2_5_7B

from chord_megatron.config import Config
from chord_megatron.planning.memory import (
    ModelState,
    Parameters,
    bytes_beside_sampler,
    checkpoint_bytes,
    export_bytes,
    model_state,
    stage_parameters,
)
from chord_megatron.planning.plan import make_plan
from chord_megatron.weights.architecture import MixtureOfExperts, ModelArchitecture

QWEN3_30B_A3B = ModelArchitecture(
    family="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_attention_heads=32,
    num_query_groups=4,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    rope_theta=1e6,
    norm_eps=1e-6,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_layernorm=True,
    moe=MixtureOfExperts(
        num_experts=128, experts_per_token=8, ffn_hidden_size=768, score_function="softmax", normalize_top_k=True
    ),
)
# As their publishers count them.
NUM_QWEN2_5_7B = 7_615_616_512
NUM_QWEN3_30B = 30_532_122_624
NUM_EXPERT = 48 * 128 * 3 * 2048 * 768


def config_of(**changes: Any) -> Config:
    """`changes` are group__leaf=value."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"path": "model"},
        "data": {"dataset": "prompts.jsonl"},
        "chord": {"chord_mu_peak": 0, "chord_mu_valley": 0},
        "train": {"output_dir": "out", "global_batch_size": 256, "train_iters": 12},
    }
    for key, value in changes.items():
        group, leaf = key.split("__")
        settings.setdefault(group, {})[leaf] = value
    return Config.model_validate(settings)


def state_of(arch: ModelArchitecture, world_size: int, **changes: Any) -> ModelState:
    config = config_of(**changes)
    return model_state(config, arch, make_plan(config, arch, world_size))


@pytest.mark.parametrize(
    ("arch", "parallel", "expected"),
    [
        (QWEN2_5_7B, {}, [Parameters(NUM_QWEN2_5_7B, 0)]),
        # The norms, 2 x 28 + 1 vectors, are whole on both ranks.
        (QWEN2_5_7B, {"tensor_model_parallel_size": 2}, [Parameters((NUM_QWEN2_5_7B + 57 * 3584) // 2, 0)]),
        # A layer has 233057792 parameters; the first stage has the embedding, the last the output and the last norm.
        (
            QWEN2_5_7B,
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            [
                Parameters(152064 * 3584 + 14 * 233_057_792, 0),
                Parameters(152064 * 3584 + 14 * 233_057_792 + 3584, 0),
            ],
        ),
        (
            QWEN3_30B_A3B,
            {"expert_model_parallel_size": 8},
            [Parameters(NUM_QWEN3_30B - NUM_EXPERT, NUM_EXPERT // 8)],
        ),
    ],
)
def test_parameters_of_each_stage(arch: ModelArchitecture, parallel: dict[str, int], expected: list[Parameters]):
    assert stage_parameters(arch, config_of(**{f"parallel__{k}": v for k, v in parallel.items()}).parallel) == expected


def test_bfloat16_takes_18_bytes_a_parameter():
    state = state_of(QWEN2_5_7B, 1)
    assert state == ModelState(
        weights=2 * NUM_QWEN2_5_7B, gradients=4 * NUM_QWEN2_5_7B, optimizer=12 * NUM_QWEN2_5_7B, reference=0
    )
    assert state.on_device == 18 * NUM_QWEN2_5_7B


def test_float32_takes_16_bytes_a_parameter_and_its_reference_4():
    state = state_of(QWEN2_5_7B, 1, model__dtype="float32", grpo__beta=0.1)
    assert state.on_device == 16 * NUM_QWEN2_5_7B
    assert state.reference == 4 * NUM_QWEN2_5_7B


def test_the_distributed_optimizer_divides_its_state_over_the_ranks_that_hold_the_same():
    """16 ranks, EP 4: a dense parameter is on all 16, an expert on 4."""
    dense, expert = NUM_QWEN3_30B - NUM_EXPERT, NUM_EXPERT // 4
    state = state_of(
        QWEN3_30B_A3B, 16, parallel__expert_model_parallel_size=4, optimizer__use_distributed_optimizer=True
    )
    assert state.weights + state.gradients == 6 * (dense + expert)
    assert state.optimizer == 12 * dense // 16 + 12 * expert // 4
    # They hold the same weights, whatever share of a sequence they run.
    spread = {"parallel__expert_model_parallel_size": 4, "parallel__context_parallel_size": 8}
    assert state_of(QWEN3_30B_A3B, 16, optimizer__use_distributed_optimizer=True, **spread) == state
    plain = state_of(QWEN3_30B_A3B, 16, parallel__expert_model_parallel_size=4)
    assert plain.optimizer == 12 * (dense + expert)


def test_what_makes_room_for_a_colocated_sampler():
    """Gradients are dropped, not copied; a sampler asleep at level 1 keeps its share of the model's 2 bytes."""
    n = NUM_QWEN2_5_7B
    rollout = {"rollout__engine": "vllm", "rollout__vllm_mode": "colocate"}
    assert state_of(QWEN2_5_7B, 1, **rollout).aside == 0
    offloaded = {**rollout, "rollout__offload_model": True, "rollout__offload_optimizer": True}
    assert state_of(QWEN2_5_7B, 1, **offloaded).aside == (2 + 12) * n
    asleep = {**rollout, "rollout__sleep_level": 1, "rollout__vllm_tensor_parallel_size": 2}
    assert state_of(QWEN2_5_7B, 2, **asleep).aside == n
    assert state_of(QWEN2_5_7B, 2, **{**asleep, "rollout__sleep_level": 2}).aside == 0

    state = state_of(QWEN2_5_7B, 1)
    for model, optimizer, stays in ((False, False, 18), (True, False, 16), (False, True, 2), (True, True, 0)):
        config = config_of(**rollout, rollout__offload_model=model, rollout__offload_optimizer=optimizer)
        assert bytes_beside_sampler(state, config.rollout) == stays * n


def test_the_fullest_stage_counts():
    state = state_of(QWEN2_5_7B, 2, parallel__pipeline_model_parallel_size=2)
    assert state.weights == 2 * (152064 * 3584 + 14 * 233_057_792 + 3584)


@pytest.mark.parametrize(
    ("dtype", "is_distributed", "saved", "exported"),
    [("bfloat16", False, 14, 2), ("bfloat16", True, 14, 2), ("float32", False, 12, 4), ("float32", True, 16, 4)],
)
def test_bytes_on_disk(dtype: str, is_distributed: bool, saved: int, exported: int):
    config = config_of(model__dtype=dtype, optimizer__use_distributed_optimizer=is_distributed)
    assert checkpoint_bytes(config, QWEN2_5_7B) == saved * NUM_QWEN2_5_7B
    assert export_bytes(config, QWEN2_5_7B) == exported * NUM_QWEN2_5_7B


N = NUM_QWEN2_5_7B
DISTRIBUTED = {"optimizer__use_distributed_optimizer": True}


@pytest.mark.parametrize(
    ("settings", "gradients", "optimizer", "offloaded"),
    [
        ({}, 4 * N, 12 * N, 0),
        ({"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}, 4 * N, (4 + 2 + 2) * N, 0),
        ({"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "float16", "main_params_dtype": "float16"}, 4 * N, 5 * N, 0),
        ({"main_grads_dtype": "bfloat16"}, 2 * N, 12 * N, 0),
        # On the host with the gradients that the step there reads.
        ({"optimizer_cpu_offload": True}, 4 * N, 0, 16 * N),
        ({"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.25}, 4 * N, 9 * N, 4 * N),
    ],
)
def test_an_optimizer_in_fewer_bits_or_on_the_host(
    settings: dict[str, Any], gradients: int, optimizer: int, offloaded: int
):
    changes = {f"optimizer__{key}": value for key, value in settings.items()}
    aware = {"optimizer__use_precision_aware_optimizer": "optimizer_cpu_offload" not in settings and bool(settings)}
    state = state_of(QWEN2_5_7B, 1, **DISTRIBUTED, **aware, **changes)
    assert (state.gradients, state.optimizer, state.offloaded) == (gradients, optimizer, offloaded)
    # A checkpoint is the same whatever they are in training.
    assert checkpoint_bytes(config_of(**DISTRIBUTED, **aware, **changes), QWEN2_5_7B) == 14 * N


def test_the_copies_of_a_save_in_the_background():
    """Those of a stage, once for all its ranks."""
    assert state_of(QWEN2_5_7B, 1).saving == 0
    changes = {"train__async_save": True, "parallel__tensor_model_parallel_size": 2}
    assert state_of(QWEN2_5_7B, 4, **changes).saving == checkpoint_bytes(config_of(**changes), QWEN2_5_7B)
