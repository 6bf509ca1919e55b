"""Which layers each pipeline stage holds: by hand, by trying all cuts, as Megatron-Core cuts, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from architectures import QWEN2_5_7B
from hypothesis import given, settings
from hypothesis import strategies as st

from chord_megatron.config import ParallelConfig
from chord_megatron.planning.memory import stage_parameters
from chord_megatron.planning.pipeline import PartCosts, balanced, part_costs, stage_layers
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import LatentAttention, MixtureOfExperts, ModelArchitecture

QWEN3_235B = replace(
    QWEN2_5_7B,
    family="qwen3_moe",
    num_layers=94,
    hidden_size=4096,
    num_attention_heads=64,
    vocab_size=151936,
    qkv_bias=False,
    qk_layernorm=True,
    moe=MixtureOfExperts(
        num_experts=128, experts_per_token=8, ffn_hidden_size=1536, score_function="softmax", normalize_top_k=True
    ),
)
DEEPSEEK_V3 = replace(
    QWEN2_5_7B,
    family="deepseek_v3",
    num_layers=61,
    hidden_size=7168,
    ffn_hidden_size=18432,
    num_attention_heads=128,
    num_query_groups=128,
    vocab_size=129280,
    qkv_bias=False,
    moe=MixtureOfExperts(
        num_experts=256,
        experts_per_token=8,
        ffn_hidden_size=2048,
        score_function="sigmoid",
        normalize_top_k=True,
        dense_layers=(0, 1, 2),
        shared_ffn_hidden_size=2048,
        has_expert_bias=True,
    ),
    mla=LatentAttention(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
)


def layers_of(arch: ModelArchitecture, pp: int, vpp: int | None = None, **keys: Any) -> list[int]:
    parallel = ParallelConfig(pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp, **keys)
    return stage_layers(parallel, arch)


def test_what_a_token_costs():
    """A 7B layer has 233,057,792 weights; of 128 experts a token meets 8."""
    assert part_costs(QWEN2_5_7B) == PartCosts(3584, 233_057_792, 3584 * 152064)
    attention = 4096 * (2 * 64 * 128 + 2 * 4 * 128) + 2 * 128  # query, output, key, value; the norms of q and k
    experts = 8 * 3 * 4096 * 1536 + 128 * 4096  # and the router
    assert part_costs(QWEN3_235B).layer == attention + experts + 2 * 4096


@pytest.mark.parametrize(
    ("arch", "pp", "vpp", "expected"),
    [
        # A head of 1.58 layers: the last stage holds 3.58, of whom no other holds more than 4.
        (DEEPSEEK_V3, 16, None, [3] + [4] * 14 + [2]),
        (DEEPSEEK_V3, 8, None, [7] + [8] * 6 + [6]),
        (DEEPSEEK_V3, 16, 2, [1] + [2] * 30 + [0]),
        # 2.79 layers: 31 x 3 and 1 + 2.79.
        (QWEN3_235B, 8, None, [12] * 7 + [10]),
        (QWEN3_235B, 8, 2, [6] * 15 + [4]),
        (QWEN3_235B, 8, 4, [3] * 31 + [1]),
        # 2.34 layers.
        (QWEN2_5_7B, 8, None, [3] + [4] * 6 + [1]),
        (QWEN2_5_7B, 2, 4, [3] + [4] * 6 + [1]),
        # Even where that is possible.
        (QWEN3_235B, 2, None, [47, 47]),
        (QWEN2_5_7B, 2, 7, [2] * 14),
        (DEEPSEEK_V3, 61, None, [1] * 61),
        (QWEN2_5_7B, 1, None, [28]),
        # The embedding alone, and the head alone.
        (QWEN2_5_7B, 30, None, [0] + [1] * 28 + [0]),
    ],
)
def test_an_even_cut_where_there_is_one_and_else_by_cost(
    arch: ModelArchitecture, pp: int, vpp: int | None, expected: list[int]
):
    assert layers_of(arch, pp, vpp) == expected


def test_a_cut_by_cost_that_is_asked_for():
    assert layers_of(QWEN2_5_7B, 2, pipeline_layout="auto") == [15, 13]
    assert layers_of(QWEN2_5_7B, 1, pipeline_layout="auto") == [28]
    # A small model with a large vocabulary: the head is 9.2 layers.
    small = replace(QWEN2_5_7B, num_layers=24, hidden_size=896, ffn_hidden_size=4864, head_dim=64)
    small = replace(small, num_attention_heads=14, num_query_groups=2, vocab_size=151936)
    assert layers_of(small, 4, pipeline_layout="auto") == [8, 8, 8, 0]


@given(
    st.integers(1, 7),
    st.integers(1, 4),
    st.floats(0.01, 0.5),
    st.floats(0.1, 6),
)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_no_cut_has_a_cheaper_dearest_stage(num_layers: int, stages: int, embedding: float, head: float):
    def dearest(held: tuple[int, ...]) -> float:
        costs = [float(layers) for layers in held]
        costs[0] += embedding
        costs[-1] += head
        return max(costs)

    found = balanced(num_layers, stages, PartCosts(embedding, 1.0, head))
    cuts = [cut for cut in product(range(num_layers + 1), repeat=stages) if sum(cut) == num_layers]
    assert sum(found) == num_layers
    assert dearest(tuple(found)) == pytest.approx(min(map(dearest, cuts)))


def test_a_list_is_taken_as_it_stands():
    assert layers_of(QWEN2_5_7B, 3, pipeline_layout=[10, 11, 7]) == [10, 11, 7]
    assert layers_of(QWEN2_5_7B, 2, 2, pipeline_layout=[0, 10, 18, 0]) == [0, 10, 18, 0]
    assert layers_of(QWEN2_5_7B, 1, pipeline_layout=[28]) == [28]


@pytest.mark.parametrize(
    ("num_layers", "pp", "vpp", "first", "last"),
    [
        (61, 16, None, 3, 2),
        (61, 4, None, 16, None),
        (61, 4, None, None, 13),
        (10, 2, None, 7, 3),
        (94, 8, 2, 10, 12),
        (94, 8, 2, 10, None),
    ],
)
def test_megatrons_spellings_mean_what_they_mean_there(
    num_layers: int, pp: int, vpp: int | None, first: int | None, last: int | None
):
    from megatron.core.transformer import TransformerConfig  # noqa: TID251 - what it is compared with
    from megatron.core.transformer.transformer_block import get_num_layers_to_build  # noqa: TID251
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # noqa: TID251

    keys = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
    theirs = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        pipeline_dtype=float,
        **keys,
    )
    ours = layers_of(replace(QWEN2_5_7B, num_layers=num_layers), pp, vpp, **keys)
    for stage, layers in enumerate(ours):
        chunk, rank = divmod(stage, pp)
        place = (chunk if vpp else None, rank)
        assert get_num_layers_to_build(theirs, *place) == layers
        assert get_transformer_layer_offset(theirs, *place) == sum(ours[:stage])


def test_parameters_of_uneven_stages():
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, pipeline_layout=[0, 9, 12, 7]
    )
    layer, matrix = 233_057_792, 3584 * 152064
    assert [held.dense for held in stage_parameters(QWEN2_5_7B, parallel)] == [
        matrix + 12 * layer,
        matrix + 3584 + 16 * layer,
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"pipeline_model_parallel_size": 31},
            "parallel.pipeline_model_parallel_size=31 stages are more than the model's 28 layers fill; "
            "choose at most 30",
        ),
        (
            {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 8},
            "parallel.pipeline_model_parallel_size x virtual_pipeline_model_parallel_size=32 stages are more than the "
            "model's 28 layers fill; choose at most 30",
        ),
        (
            {"pipeline_model_parallel_size": 3, "pipeline_layout": [10, 10, 10]},
            "parallel.pipeline_layout=[10, 10, 10] adds up to 30 layers, but the model has 28; mend it",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "pipeline_layout": [14, 14],
            },
            "parallel.pipeline_layout has 2 entries, but parallel.pipeline_model_parallel_size x "
            "virtual_pipeline_model_parallel_size makes 4 stages; give the layers of each",
        ),
        (
            {"pipeline_layout": [14, 14]},
            "parallel.pipeline_layout has 2 entries, but parallel.pipeline_model_parallel_size makes 1 stages; give "
            "the layers of each",
        ),
        (
            {"pipeline_model_parallel_size": 4, "pipeline_layout": [14, 7, 0, 7]},
            "parallel.pipeline_layout=[14, 7, 0, 7] leaves stage 2 (of 0 to 3) without a layer, which only the first "
            "and the last may be; give it one",
        ),
        (
            {
                "pipeline_model_parallel_size": 3,
                "num_layers_in_first_pipeline_stage": 9,
                "num_layers_in_last_pipeline_stage": 7,
                "pipeline_layout": "auto",
            },
            "parallel.num_layers_in_first_pipeline_stage=9 and num_layers_in_last_pipeline_stage=7 cannot stand beside "
            "parallel.pipeline_layout, which says it all; set one of them",
        ),
        (
            {"num_layers_in_last_pipeline_stage": 28},
            "parallel.num_layers_in_last_pipeline_stage=28 without a pipeline; remove it, or set "
            "parallel.pipeline_model_parallel_size above 1",
        ),
        (
            {"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 6},
            "parallel.num_layers_in_first_pipeline_stage=6 leaves 22 of the model's 28 layers to 3 other stages, which "
            "is no even cut; set parallel.pipeline_layout",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 14,
                "num_layers_in_last_pipeline_stage": 13,
            },
            "parallel.num_layers_in_first_pipeline_stage=14 and num_layers_in_last_pipeline_stage=13 leaves 1 of the "
            "model's 28 layers to 0 other stages, which is no even cut; set parallel.pipeline_layout",
        ),
        (
            {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 29},
            "parallel.num_layers_in_first_pipeline_stage=29 wants 29 layers, but the model has 28; lower it",
        ),
        (
            {
                "pipeline_model_parallel_size": 3,
                "num_layers_in_first_pipeline_stage": 20,
                "num_layers_in_last_pipeline_stage": 9,
            },
            "parallel.num_layers_in_first_pipeline_stage=20 and num_layers_in_last_pipeline_stage=9 wants 29 layers, "
            "but the model has 28; lower it",
        ),
        (
            {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 28},
            "parallel.num_layers_in_first_pipeline_stage=28 leaves 0 of the model's 28 layers to 2 other stages, which "
            "is no even cut; set parallel.pipeline_layout",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 13,
            },
            "parallel.num_layers_in_first_pipeline_stage=13 leaves 15 of the model's 28 layers to 1 other stages "
            "(chunks of a stage: 2), which is no even cut; set parallel.pipeline_layout",
        ),
    ],
)
def test_a_cut_that_is_refused(keys: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        stage_layers(ParallelConfig(**keys), QWEN2_5_7B)
    assert str(error.value) == message
