"""What Megatron-LM's arguments in a checkpoint say of a model; nothing in the file is executed."""

from __future__ import annotations

import argparse
import enum
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import MODELS, make_model

from chord_megatron.checkpoints.megatron_args import architecture_from_args, read_megatron_args, refuse_other_args
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import Llama3Rope, ModelArchitecture, YarnRope
from chord_megatron.weights.hf_config import parse_config


class Backend(enum.Enum):
    AUTO = 5


def architecture(name: str, **changes: Any) -> ModelArchitecture:
    model = make_model(name, **changes)
    return parse_config(model.config.to_dict() | {"architectures": [type(model).__name__]})


def as_args(arch: ModelArchitecture) -> dict[str, Any]:
    """How Megatron-LM is told to build this model."""
    args = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "group_query_attention": arch.mla is None,
        "num_query_groups": arch.num_query_groups if arch.mla is None else 1,
        "kv_channels": arch.head_dim if arch.mla is None else 12,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings,
        "rotary_base": int(arch.rope_theta),
        "norm_epsilon": arch.norm_eps,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_layernorm or arch.mla is not None,
        "untie_embeddings_and_output_weights": not arch.tie_word_embeddings,
        "use_rope_scaling": isinstance(arch.rope_scaling, Llama3Rope),
        "num_experts": None,
    }
    if arch.moe:
        args |= {
            "num_experts": arch.moe.num_experts,
            "moe_router_topk": arch.moe.experts_per_token,
            "moe_ffn_hidden_size": arch.moe.ffn_hidden_size,
            "moe_layer_freq": [int(layer not in arch.moe.dense_layers) for layer in range(arch.num_layers)],
            "moe_router_score_function": arch.moe.score_function,
            "moe_router_pre_softmax": not arch.moe.normalize_top_k,
            "moe_shared_expert_intermediate_size": arch.moe.shared_ffn_hidden_size,
            "moe_router_num_groups": arch.moe.num_groups,
            "moe_router_group_topk": arch.moe.top_k_groups,
            "moe_router_topk_scaling_factor": arch.moe.routed_scaling_factor,
            "moe_router_enable_expert_bias": arch.moe.has_expert_bias,
        }
    if arch.mla:
        args |= {
            "multi_latent_attention": True,
            "q_lora_rank": arch.mla.q_lora_rank,
            "kv_lora_rank": arch.mla.kv_lora_rank,
            "qk_head_dim": arch.mla.qk_nope_head_dim,
            "qk_pos_emb_head_dim": arch.mla.qk_rope_head_dim,
            "v_head_dim": arch.mla.v_head_dim,
            "rope_type": "rope",
            "rotary_scaling_factor": 40,
        }
    if isinstance(arch.rope_scaling, YarnRope):
        yarn = vars(arch.rope_scaling)
        args |= {"rope_type": "yarn", "rotary_scaling_factor": yarn["factor"]}
        args |= {key: value for key, value in yarn.items() if key != "factor"}
    return args


def save(directory: Path, args: dict[str, Any]) -> None:
    """As Megatron-LM does: a namespace with enums and dtypes in it."""
    namespace = argparse.Namespace(**args, attention_backend=Backend.AUTO, params_dtype=torch.bfloat16)
    torch.save({"args": namespace, "iteration": 7, "tensor": torch.ones(2)}, directory / "common.pt")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("llama", "mistral")])
def test_every_family(tmp_path: Path, name: str, tied: bool) -> None:
    arch = architecture(name, tied=tied)
    save(tmp_path, as_args(arch))
    args = read_megatron_args(tmp_path)
    assert args is not None and architecture_from_args(args) == arch


def test_llama_with_the_rope_scaling_of_megatron_lm(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    arch = architecture("llama", rope_parameters=rope)
    assert architecture_from_args(as_args(arch) | {"rope_scaling_factor": 32.0}) == arch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization": "LayerNorm", "swiglu": False}, "normalization=LayerNorm, swiglu=False"),
        ({"rotary_percent": 0.5}, r"rotary_percent=0\.5"),
        ({"mtp_num_layers": 1}, "mtp_num_layers=1"),
        ({"vocab_size": None}, "--hf-config"),
        ({"add_qkv_bias": True, "qk_layernorm": True}, "combines biases on query, key and value, norms on queries"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_family_has_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        architecture_from_args(as_args(architecture("qwen3")) | change)


def test_yarn_has_the_defaults_of_megatron_core_where_nothing_is_said() -> None:
    args = as_args(architecture("deepseek_v3")) | {"rope_type": None, "rotary_scaling_factor": 40}
    for name in ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale"):
        del args[name]
    assert architecture_from_args(args).rope_scaling == YarnRope(40, 4096, 32.0, 1.0, 1.0, mscale_all_dim=1.0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("deepseek_v3", {"norm_epsilon": 1e-5}, "`rms_norm_eps: 1e-05` is not supported for DeepseekV3ForCausalLM"),
        ("deepseek_v3", {"mscale_all_dim": 0.0}, "`rope_scaling.mscale_all_dim` must be a positive number, found 0.0"),
        ("deepseek_v3", {"moe_shared_expert_intermediate_size": 50}, "moe.shared_ffn_hidden_size=50 is not supported"),
        ("mixtral", {"moe_layer_freq": [0, 1, 1, 1]}, "moe.dense_layers=(0,) is not supported for MixtralForCausalLM"),
        ("mixtral", {"moe_router_enable_expert_bias": True}, "moe.has_expert_bias=True is not supported"),
        ("qwen3_moe", {"moe_shared_expert_intermediate_size": 48}, "`n_shared_experts: 2` is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_no_config_can_say_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        architecture_from_args(as_args(architecture(name)) | change)
    assert str(error.value).startswith(f"no config.json can describe this model: {message}")


@pytest.mark.parametrize("name", MODELS)
def test_the_arguments_of_a_model_do_not_contradict_its_config(name: str) -> None:
    arch = architecture(name)
    args = as_args(arch)
    if name == "llama":  # a scaling that Megatron-LM cannot be told
        arch = replace(arch, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192))
    refuse_other_args(args, arch)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "qwen3",
            {"qk_layernorm": False},
            "qk_layernorm=False where config.json says architectures=['Qwen3ForCausalLM']",
        ),
        ("qwen2", {"num_experts": 4}, "num_experts=4 where config.json says architectures=['Qwen2ForCausalLM']"),
        ("mixtral", {"num_experts": None}, "num_experts=None where config.json says num_local_experts=4"),
        ("mixtral", {"moe_router_topk": 1}, "moe_router_topk=1 where config.json says num_experts_per_tok=2"),
        (
            "mixtral",
            {"moe_router_pre_softmax": True},
            "moe_router_pre_softmax=True where config.json says architectures=['MixtralForCausalLM']",
        ),
        (
            "deepseek_v3",
            {"moe_router_topk_scaling_factor": None},
            "moe_router_topk_scaling_factor=None where config.json says routed_scaling_factor=2.5",
        ),
        ("deepseek_v3", {"moe_layer_freq": 1}, "moe_layer_freq=1 where config.json says first_k_dense_replace=1"),
        ("deepseek_v3", {"v_head_dim": 12}, "v_head_dim=12 where config.json says v_head_dim=10"),
        (
            "deepseek_v3-plain",
            {"rope_type": None},
            "rope_type=None, rotary_scaling_factor=40 where config.json says rope_scaling=None",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_every_contradiction_is_named(name: str, change: dict[str, Any], said: str) -> None:
    arch = architecture(name)
    with pytest.raises(UserError) as error:
        refuse_other_args(as_args(arch) | change, arch)
    assert str(error.value) == (
        f"the checkpoint was trained with {said}; use the config.json that belongs to these weights"
    )


def test_the_scale_of_yarn_without_its_frequencies_is_refused() -> None:
    args = as_args(architecture("deepseek_v3-plain")) | {"mscale_all_dim": 1.0}
    with pytest.raises(UserError, match=r"rope_type=rope, rotary_scaling_factor=40, mscale_all_dim=1\.0, which no"):
        architecture_from_args(args)


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size"),
    [
        ({"tokenizer_type": "NullTokenizer"}, 132),  # up to 0.17 it adds an end of document
        ({"tokenizer_type": "NullTokenizer", "null_tokenizer_eod_id": None}, 131),  # since 0.18
        ({"tokenizer_type": "HuggingFaceTokenizer"}, 131),
    ],
)
def test_the_vocabulary_of_null_tokenizer(tokenizer: dict[str, Any], vocab_size: int) -> None:
    assert architecture_from_args(as_args(architecture("qwen3")) | tokenizer).vocab_size == vocab_size


def test_nothing_in_the_file_is_executed(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"args": argparse.Namespace(num_layers=2, other=Malicious())}, tmp_path / "common.pt")
    args = read_megatron_args(tmp_path)
    assert args is not None and args["num_layers"] == 2
    assert not (tmp_path / "executed").exists()


def test_checkpoints_without_arguments_and_damaged_ones(tmp_path: Path) -> None:
    assert read_megatron_args(tmp_path) is None
    torch.save({"content_metadata": {}}, tmp_path / "common.pt")
    assert read_megatron_args(tmp_path) is None
    (tmp_path / "common.pt").write_bytes((tmp_path / "common.pt").read_bytes()[:100])
    with pytest.raises(UserError, match=r"the common state of .* is damaged"):
        read_megatron_args(tmp_path)
