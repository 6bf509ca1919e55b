"""Hugging Face -> Megatron shards -> Hugging Face is the identity, and each layout is the documented one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_families import MODELS, make_model
from torch import Tensor

from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import MixtureOfExperts, ModelArchitecture
from chord_megatron.weights.families import FAMILIES
from chord_megatron.weights.hf_config import read_architecture
from chord_megatron.weights.mapping import find_mapping, hf_tensors, is_ignorable, parameter_names
from chord_megatron.weights.safetensors_io import SafetensorsReader, check_complete
from chord_megatron.weights.shards import export_parameter, import_parameter

PADDED_VOCAB = 256
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
        ranks = 1 if "experts" in name and "shared" not in name else tp_size
        shards = [
            import_parameter(name, arch, reader.get_slice, tp_rank=rank, tp_size=ranks, padded_vocab_size=PADDED_VOCAB)
            for rank in range(ranks)
        ]
        exported.update(export_parameter(name, arch, shards))
    return exported


def test_every_family_has_a_tiny_model() -> None:
    assert {name.split("-")[0] for name in MODELS} == set(FAMILIES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bitwise_equal(
    tiny_models: Callable[..., Path], name: str, tied: bool, tp_size: int, dtype: str
) -> None:
    model = tiny_models(name, tied=tied, dtype=dtype)
    arch = read_architecture(model)
    with SafetensorsReader(model) as reader:
        check_complete(reader, arch)
        original = {name: reader.get_slice(name)[:] for name in reader.names()}
        exported = round_trip(reader, arch, tp_size)
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    announced = hf_tensors(arch, getattr(torch, dtype))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in exported.items()} == announced
    assert list(exported) == list(announced)


@pytest.mark.parametrize("name", MODELS)
def test_tensors_come_in_the_order_of_transformers(tiny_models: Callable[..., Path], name: str) -> None:
    """But for a layer's biases, which follow its query, key and value weights, and fused experts, which are apart."""
    model = make_model(name)
    ours = [x for x in hf_tensors(read_architecture(tiny_models(name)), torch.float32) if ".experts." not in x]
    theirs = [x for x in model.state_dict() if ".experts." not in x]
    ours = [x.replace("block_sparse_moe", "mlp") for x in ours]
    assert [x for x in ours if not x.endswith("proj.bias")] == [x for x in theirs if not x.endswith("proj.bias")]
    assert sorted(ours) == sorted(theirs)


def test_each_expert_has_its_own_tensors() -> None:
    """Mixtral: w1 is the gate, w3 the up projection, w2 the way down (verl#2319 mixed such names up)."""
    moe = MixtureOfExperts(2, 1, ffn_hidden_size=1, score_function="softmax", normalize_top_k=True)
    arch = replace(TINY, family="mixtral", moe=moe)
    hf = "model.layers.0.block_sparse_moe.experts."
    tensors = {
        f"{hf}{expert}.{name}.weight": torch.tensor([[10.0 * expert + offset]] * rows).expand(rows, columns)
        for expert in range(2)
        for name, offset, rows, columns in (("w1", 1, 1, 2), ("w2", 2, 2, 1), ("w3", 3, 1, 2))
    }
    prefix = LAYER + "mlp.experts."
    for name in (prefix + "local_experts.1.linear_fc1.weight", prefix + "linear_fc1.weight1"):
        assert load(name, arch, tensors).tolist() == [[11.0, 11.0], [13.0, 13.0]]
    assert load(prefix + "local_experts.1.linear_fc2.weight", arch, tensors).tolist() == [[12.0], [12.0]]
    exported = export_parameter(prefix + "linear_fc1.weight1", arch, [torch.tensor([[5.0, 6.0], [7.0, 8.0]])])
    assert [(name, tensor.tolist()) for name, tensor in exported] == [
        (hf + "1.w1.weight", [[5.0, 6.0]]),
        (hf + "1.w3.weight", [[7.0, 8.0]]),
    ]
    found = find_mapping(prefix + "linear_fc1.weight1", arch)
    assert (found.layer, found.expert, found.local_name) == (0, 1, prefix + "local_experts.1.linear_fc1.weight")
    assert found.mapping.checkpoint_key == "decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight"
    with pytest.raises(UserError, match="weight2"):
        find_mapping(prefix + "linear_fc1.weight2", arch)


def test_layers_with_and_without_experts(tiny_models: Callable[..., Path]) -> None:
    """Under Transformer Engine only a plain MLP has the norm before it fused in."""
    arch = read_architecture(tiny_models("qwen3_moe-mixed"))  # layer 2 has no experts
    assert arch.moe is not None and arch.moe.dense_layers == (2,)
    names = parameter_names(arch)
    assert "decoder.layers.2.mlp.linear_fc1.weight" in names and "decoder.layers.1.mlp.linear_fc1.weight" not in names
    assert "decoder.layers.1.mlp.router.weight" in names and "decoder.layers.2.mlp.router.weight" not in names
    keys = [
        find_mapping(f"decoder.layers.{layer}.pre_mlp_layernorm.weight", arch).mapping.checkpoint_key
        for layer in (1, 2)
    ]
    assert keys == [
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
    ]


def test_tensors_that_nothing_reads(tiny_models: Callable[..., Path]) -> None:
    """The layer after DeepSeek-V3's last one predicts further tokens."""
    arch = read_architecture(tiny_models("deepseek_v3"))  # 4 layers
    assert is_ignorable("model.layers.4.embed_tokens.weight", arch)
    assert not is_ignorable("model.layers.3.embed_tokens.weight", arch)
    assert not is_ignorable("model.layers.40.embed_tokens.weight", arch)
    assert is_ignorable("model.layers.0.self_attn.rotary_emb.inv_freq", TINY)
    assert not is_ignorable("lm_head.weight", TINY)


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
