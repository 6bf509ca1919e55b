"""Which parts of a layer can be computed again, by what the model has."""

from __future__ import annotations

import dataclasses

import pytest
from architectures import QWEN2_5_7B

from chord_megatron.config import ModelConfig
from chord_megatron.planning.recomputation import check_recomputation
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import LatentAttention, MixtureOfExperts

EXPERTS = MixtureOfExperts(8, 2, 64, "softmax", normalize_top_k=True)
MLA = LatentAttention(None, 16, 12, 8, 10)
MODELS = {
    "dense": QWEN2_5_7B,
    "latent": dataclasses.replace(QWEN2_5_7B, mla=MLA),
    "experts": dataclasses.replace(QWEN2_5_7B, moe=EXPERTS),
    "experts in all layers but one": dataclasses.replace(
        QWEN2_5_7B, moe=dataclasses.replace(EXPERTS, dense_layers=(0,), shared_ffn_hidden_size=64)
    ),
}
ALWAYS = {"core_attn", "layernorm"}
PARTS = {
    "dense": ALWAYS | {"mlp"},
    "latent": ALWAYS | {"mlp", "mla_up_proj"},
    "experts": ALWAYS | {"moe", "moe_act"},
    "experts in all layers but one": ALWAYS | {"moe", "moe_act", "mlp", "shared_experts"},
}
LACKING = {
    "mlp": "layer without experts",
    "mla_up_proj": "latent attention",
    "moe": "experts",
    "moe_act": "experts",
    "shared_experts": "shared experts",
}


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_its_parts_and_no_others(model: str):
    for part in ALWAYS | LACKING.keys():
        settings = ModelConfig(path="m", recompute=["core_attn", part])
        if part in PARTS[model]:
            check_recomputation(settings, MODELS[model])
            continue
        with pytest.raises(UserError) as error:
            check_recomputation(settings, MODELS[model])
        assert str(error.value) == (
            f"model.recompute names {part}, but the model has no {LACKING[part]}; remove it from the list"
        )


@pytest.mark.parametrize("value", [True, "full"])
def test_whole_layers_have_a_method(value: bool | str):
    settings = ModelConfig(path="m", recompute=value, recompute_method="block", recompute_num_layers=3)
    check_recomputation(settings, QWEN2_5_7B)


@pytest.mark.parametrize("value", [False, ["mlp"]])
def test_parts_have_no_method(value: bool | list[str]):
    settings = ModelConfig(path="m", recompute=value, recompute_method="block")
    with pytest.raises(UserError, match=r"^model\.recompute_method=block is for model\.recompute=full"):
        check_recomputation(settings, QWEN2_5_7B)
