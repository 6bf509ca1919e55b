"""Hugging Face -> Megatron shards -> Hugging Face is the identity, and each layout is the documented one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from chord_megatron.convert.architecture import ModelArchitecture
from chord_megatron.convert.families import find_mapping, hf_names, parameter_names
from chord_megatron.convert.hf_config import read_architecture
from chord_megatron.convert.safetensors_io import SafetensorsReader, check_complete, write_safetensors
from chord_megatron.convert.shards import export_parameter, import_parameter
from chord_megatron.types import UserError

VOCAB, PADDED_VOCAB = 100, 128
MODELS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),  # 4 x 8 is not the hidden size
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}
TINY = ModelArchitecture(
    family="llama",
    num_layers=1,
    hidden_size=2,
    ffn_hidden_size=4,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=1,
    vocab_size=5,
    max_position_embeddings=16,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_layernorm=False,
)
LAYER = "decoder.layers.0."


class RecordingSlice:
    """A tensor that remembers how it was indexed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.asked: list[object] = []

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: object) -> Tensor:
        self.asked.append(index)
        return self.tensor[index]


def tiny_model(family: str, tied: bool) -> PreTrainedModel:
    config_class, model_class, extra = MODELS[family]
    torch.manual_seed(0)
    model = model_class(
        config_class(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            **extra,
        )
    )
    for parameter in model.parameters():  # biases and norms start as constants, which hide permutations
        torch.nn.init.normal_(parameter)
    return model


def load(name: str, arch: ModelArchitecture, tensors: dict[str, Tensor], rank: int = 0, size: int = 1) -> Tensor:
    return import_parameter(
        name,
        arch,
        lambda hf_name: RecordingSlice(tensors[hf_name]),
        tp_rank=rank,
        tp_size=size,
        padded_vocab_size=8 if arch is TINY else PADDED_VOCAB,
    )


def round_trip(reader: SafetensorsReader, arch: ModelArchitecture, tp_size: int) -> dict[str, Tensor]:
    exported = {}
    for name in parameter_names(arch):
        shards = [
            import_parameter(
                name,
                arch,
                reader.get_slice,
                tp_rank=rank,
                tp_size=tp_size,
                padded_vocab_size=PADDED_VOCAB,
            )
            for rank in range(tp_size)
        ]
        exported.update(export_parameter(name, arch, shards))
    return exported


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_round_trip_is_bitwise_equal(tmp_path: Path, family: str, tied: bool, tp_size: int) -> None:
    model = tiny_model(family, tied)
    model.save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    with SafetensorsReader(tmp_path) as reader:
        check_complete(reader, arch)
        exported = round_trip(reader, arch, tp_size)
    original = model.state_dict()
    if tied:
        del original["lm_head.weight"]
    assert exported.keys() == original.keys() == hf_names(arch)
    assert all(torch.equal(exported[name], original[name]) for name in original)


@pytest.mark.parametrize("family", MODELS)
def test_written_model_loads_in_transformers_with_the_same_logits(tmp_path: Path, family: str) -> None:
    model = tiny_model(family, tied=True).eval()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    arch = read_architecture(tmp_path / "sharded")
    with SafetensorsReader(tmp_path / "sharded") as reader:
        check_complete(reader, arch)
        write_safetensors(tmp_path / "out", round_trip(reader, arch, 2).items(), max_shard_bytes=8192)
    model.config.save_pretrained(tmp_path / "out")
    tokens = torch.arange(VOCAB)[None, :32]
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


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
            "GPT2LMHeadModel is not supported; use one of Qwen2ForCausalLM",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_parameters"),
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


def test_qkv_rows_are_interleaved_per_query_group() -> None:
    """4 query heads, 2 groups, head_dim 1: rows q0 q1 k0 v0 | q2 q3 k1 v1."""
    prefix = "model.layers.0.self_attn."
    tensors = {
        prefix + "q_proj.weight": torch.tensor([[0, 1], [10, 11], [20, 21], [30, 31]]),
        prefix + "k_proj.weight": torch.tensor([[40, 41], [50, 51]]),
        prefix + "v_proj.weight": torch.tensor([[60, 61], [70, 71]]),
    }
    name = LAYER + "self_attention.linear_qkv.weight"
    first = [[0, 1], [10, 11], [40, 41], [60, 61]]
    second = [[20, 21], [30, 31], [50, 51], [70, 71]]
    assert load(name, TINY, tensors).tolist() == first + second
    assert load(name, TINY, tensors, 0, 2).tolist() == first
    assert load(name, TINY, tensors, 1, 2).tolist() == second
    exported = dict(export_parameter(name, TINY, [torch.tensor(first), torch.tensor(second)]))
    assert {key: value.tolist() for key, value in exported.items()} == {
        key: value.tolist() for key, value in tensors.items()
    }


def test_qkv_bias_with_two_rows_per_head() -> None:
    arch = replace(TINY, family="qwen2", qkv_bias=True, head_dim=2)
    prefix = "model.layers.0.self_attn."
    tensors = {
        prefix + "q_proj.bias": torch.arange(8),
        prefix + "k_proj.bias": torch.arange(8, 12),
        prefix + "v_proj.bias": torch.arange(12, 16),
    }
    bias = load(LAYER + "self_attention.linear_qkv.bias", arch, tensors)
    assert bias.tolist() == [0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]


def test_gate_and_up_are_concatenated_per_rank() -> None:
    tensors = {
        "model.layers.0.mlp.gate_proj.weight": torch.arange(8).view(4, 2),
        "model.layers.0.mlp.up_proj.weight": torch.arange(10, 18).view(4, 2),
    }
    name = LAYER + "mlp.linear_fc1.weight"
    assert load(name, TINY, tensors, 1, 2).tolist() == [[4, 5], [6, 7], [14, 15], [16, 17]]


def test_vocabulary_is_padded_with_zero_rows_and_unpadded_on_export() -> None:
    full = torch.arange(1, 11).view(5, 2)
    name = "embedding.word_embeddings.weight"
    shards = [load(name, TINY, {"model.embed_tokens.weight": full}, rank, 4) for rank in range(4)]
    assert [shard.tolist() for shard in shards] == [
        [[1, 2], [3, 4]],
        [[5, 6], [7, 8]],
        [[9, 10], [0, 0]],
        [[0, 0], [0, 0]],
    ]
    [(hf_name, exported)] = export_parameter(name, TINY, shards)
    assert hf_name == "model.embed_tokens.weight" and torch.equal(exported, full)


def test_a_rank_reads_only_its_rows_or_columns() -> None:
    arch = replace(TINY, head_dim=2)
    prefix = "model.layers.0."
    slices = {
        prefix + "self_attn.q_proj.weight": RecordingSlice(torch.zeros(8, 2)),
        prefix + "self_attn.k_proj.weight": RecordingSlice(torch.zeros(4, 2)),
        prefix + "self_attn.v_proj.weight": RecordingSlice(torch.zeros(4, 2)),
        prefix + "mlp.down_proj.weight": RecordingSlice(torch.zeros(2, 4)),
        "model.embed_tokens.weight": RecordingSlice(torch.zeros(5, 2)),
    }
    for name in (
        LAYER + "self_attention.linear_qkv.weight",
        LAYER + "mlp.linear_fc2.weight",
        "embedding.word_embeddings.weight",
    ):
        import_parameter(name, arch, slices.__getitem__, tp_rank=1, tp_size=2, padded_vocab_size=6)
    assert [recorded.asked for recorded in slices.values()] == [
        [slice(4, 8)],
        [slice(2, 4)],
        [slice(2, 4)],
        [(slice(None), slice(2, 4))],
        [slice(3, 5)],
    ]


def test_transformer_engine_names_are_the_fused_norms() -> None:
    for te, local, hf in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "input_layernorm"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight", "post_attention_layernorm"),
    ):
        weight = torch.tensor([1.5, 2.5])
        assert find_mapping(LAYER + te, TINY) == find_mapping(LAYER + local, TINY)
        assert torch.equal(load(LAYER + te, TINY, {f"model.layers.0.{hf}.weight": weight}, 1, 2), weight)
        [(hf_name, exported)] = export_parameter(LAYER + te, TINY, [weight, weight])
        assert hf_name == f"model.layers.0.{hf}.weight" and torch.equal(exported, weight)


def test_tied_output_layer_is_read_from_the_embedding_and_not_exported() -> None:
    tied = replace(TINY, tie_word_embeddings=True)
    embedding = RecordingSlice(torch.arange(10.0).view(5, 2))
    shard = import_parameter(
        "output_layer.weight",
        tied,
        {"model.embed_tokens.weight": embedding}.__getitem__,
        tp_rank=0,
        tp_size=2,
        padded_vocab_size=8,
    )
    assert torch.equal(shard, embedding.tensor[:4])
    assert export_parameter("output_layer.weight", tied, [shard, shard]) == []
    assert "output_layer.weight" not in parameter_names(tied)
    assert parameter_names(TINY)[-1] == "output_layer.weight"


@pytest.mark.parametrize("name", ["decoder.layers.1.mlp.linear_fc1.weight", LAYER + "mlp.linear_fc1.bias"])
def test_unknown_parameters_are_named(name: str) -> None:
    with pytest.raises(UserError, match=name):
        export_parameter(name, TINY, [torch.zeros(2)])


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \[3\] .* asks for \[2\]"):
        load("decoder.final_layernorm.weight", TINY, {"model.norm.weight": torch.zeros(3)})
    with pytest.raises(UserError, match=r"linear_qkv\.weight has shape \[7, 2\] .* asks for \[8, 2\]"):
        export_parameter(LAYER + "self_attention.linear_qkv.weight", TINY, [torch.zeros(7, 2)])


def test_query_groups_are_never_split() -> None:
    """2 groups of head_dim 2 have 4 key rows, yet 4 ranks cannot share them."""
    arch = replace(TINY, head_dim=2)
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 2)}
    with pytest.raises(UserError, match=r"choose a tensor_model_parallel_size that divides 2\."):
        load(LAYER + "self_attention.linear_qkv.weight", arch, tensors, 0, 4)
