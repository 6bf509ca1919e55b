"""config.json as transformers 4 and 5 write it, into a ModelArchitecture and back; what is not modelled is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_families import LLAMA3_ROPE, MODELS, make_model
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import (
    LatentAttention,
    LinearRope,
    Llama3Rope,
    MixtureOfExperts,
    ModelArchitecture,
    YarnRope,
)
from chord_megatron.weights.hf_config import make_config, parse_config, read_architecture


def test_architecture_of_a_transformers_5_config(tmp_path: Path) -> None:
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        hidden_size=64,
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        tie_word_embeddings=True,
    )
    config.save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    assert (arch.family, arch.head_dim, arch.rope_theta) == ("qwen3", 32, 1e6)
    assert (arch.tie_word_embeddings, arch.qkv_bias, arch.qk_layernorm) == (True, False, True)


CONFIG_4 = {  # as transformers 4 wrote it
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "initializer_range": 0.01,
}


def test_architecture_of_a_transformers_4_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_4))
    assert read_architecture(tmp_path) == ModelArchitecture(
        family="qwen2",
        num_layers=24,
        hidden_size=896,
        ffn_hidden_size=4864,
        num_attention_heads=14,
        num_query_groups=2,
        head_dim=64,
        vocab_size=151936,
        max_position_embeddings=32768,
        rope_theta=1e6,
        norm_eps=1e-6,
        tie_word_embeddings=True,
        qkv_bias=True,
        qk_layernorm=False,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel is not supported; use one of LlamaForCausalLM",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_parameters.factor"),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "full_attention"),
        ({"rope_scaling": "linear"}, "`rope_scaling` must be an object"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"logit_scale": 0.0625, "residual_multiplier": 0.22}, "`logit_scale: 0.0625`, `residual_multiplier: 0.22`"),
        ({"architectures": ["MistralForCausalLM"]}, "sliding_window"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"architectures": ["LlamaForCausalLM"], "mlp_bias": True}, "mlp_bias"),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_unsupported_configs_are_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_4 | change))
    with pytest.raises(UserError, match=message):
        read_architecture(tmp_path)


def test_missing_and_invalid_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a directory"):
        read_architecture(tmp_path / "absent")
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_architecture(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[]", "JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_architecture(tmp_path)


DEEPSEEK_V3 = {  # as published with DeepSeek-V3, but for quantization_config
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_architecture_of_deepseek_v3() -> None:
    arch = parse_config(DEEPSEEK_V3)
    assert arch.rope_scaling == YarnRope(40, 4096, 32, 1, 1.0, 1.0)
    assert arch.mla == LatentAttention(1536, 512, 128, 64, 128)
    assert arch.moe == MixtureOfExperts(
        num_experts=256,
        experts_per_token=8,
        ffn_hidden_size=2048,
        score_function="sigmoid",
        normalize_top_k=True,
        dense_layers=(0, 1, 2),
        shared_ffn_hidden_size=2048,
        num_groups=8,
        top_k_groups=4,
        routed_scaling_factor=2.5,
        has_expert_bias=True,
    )
    assert (arch.num_query_groups, arch.head_dim) == (128, 192)


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"scoring_func": "softmax"},
        {"topk_method": "greedy"},
        {"rope_interleave": False},
        {"rms_norm_eps": 1e-5},
        {"moe_layer_freq": 2},
        {"num_experts_per_tok": 6},
        {"norm_topk_prob": False},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_deepseek_v3_must_not_say(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        parse_config(DEEPSEEK_V3 | change)


def test_rope_scaling_in_both_spellings() -> None:
    """Llama 3.1 as transformers 4 and as transformers 5 write it."""
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    spelled_4 = {"rope_theta": 500.0, "rope_scaling": scaling}
    spelled_5 = {"rope_parameters": LLAMA3_ROPE}
    llama = {key: value for key, value in CONFIG_4.items() if not key.startswith("rope")}
    llama |= {"architectures": ["LlamaForCausalLM"], "use_sliding_window": None, "sliding_window": None}
    archs = [parse_config(llama | spelling) for spelling in (spelled_4, spelled_5)]
    assert archs[0] == archs[1]
    assert (archs[0].rope_theta, archs[0].rope_scaling) == (500.0, Llama3Rope(8.0, 1.0, 4.0, 16))
    assert parse_config(CONFIG_4 | {"rope_scaling": {"type": "linear", "factor": 2}}).rope_scaling == LinearRope(2)


def test_an_absent_key_means_what_transformers_assumes() -> None:
    """Mistral without sliding_window has one of 4096; null switches it off. Mixtral's rope_theta is a million."""
    mistral = {key: value for key, value in CONFIG_4.items() if "sliding" not in key}
    mistral["architectures"] = ["MistralForCausalLM"]
    assert parse_config(mistral | {"sliding_window": None}).family == "mistral"
    with pytest.raises(ValueError, match="sliding_window: 4096"):
        parse_config(mistral)
    mixtral = {key: value for key, value in mistral.items() if key != "rope_theta"}
    mixtral |= {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
    assert parse_config(mixtral).rope_theta == 1e6


@pytest.mark.parametrize("spelling", ["num_experts", "num_local_experts"])
def test_qwen3_moe_in_both_spellings(spelling: str) -> None:
    config = make_model("qwen3_moe").config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]}
    config = {key: value for key, value in config.items() if key not in ("num_experts", "num_local_experts")}
    arch = parse_config(config | {spelling: 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]})
    assert arch.moe is not None and (arch.moe.num_experts, arch.moe.dense_layers) == (4, (0, 1, 2))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", MODELS)
def test_config_goes_both_ways(tmp_path: Path, name: str, tied: bool) -> None:
    """What make_config writes, transformers reads as the model that it came from."""
    make_model(name, tied=tied).save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    written = make_config(arch)
    assert parse_config(written) == arch
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dummy_inputs.keys() == again.dummy_inputs.keys()
    tokens = model.dummy_inputs["input_ids"]
    assert model(tokens).logits.equal(again(tokens).logits)
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings == tied


def test_linear_rope_goes_both_ways() -> None:
    arch = replace(parse_config(CONFIG_4), rope_scaling=LinearRope(2.0))
    assert parse_config(make_config(arch)) == arch
