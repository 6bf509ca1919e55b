"""Weight folders: completeness, damage, shard sizes, replacement of earlier files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chord_megatron.convert.architecture import ModelArchitecture
from chord_megatron.convert.families import hf_names
from chord_megatron.convert.safetensors_io import SafetensorsReader, check_complete, write_safetensors
from chord_megatron.types import UserError

ARCH = ModelArchitecture(
    family="qwen3",
    num_layers=1,
    hidden_size=2,
    ffn_hidden_size=4,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=1,
    vocab_size=5,
    max_position_embeddings=16,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_word_embeddings=True,
    qkv_bias=False,
    qk_layernorm=True,
)


def save_names(directory: Path, names: set[str]) -> SafetensorsReader:
    save_file({name: torch.zeros(1) for name in names}, directory / "model.safetensors")
    return SafetensorsReader(directory)


def test_missing_tensors_are_listed(tmp_path: Path) -> None:
    with (
        save_names(tmp_path, hf_names(ARCH) - {"model.norm.weight"}) as reader,
        pytest.raises(UserError, match=r"lacks tensors .*: model\.norm\.weight \(1\)"),
    ):
        check_complete(reader, ARCH)


def test_unexpected_tensors_are_listed_five_at_most(tmp_path: Path) -> None:
    extra = {f"model.extra.{i}" for i in range(7)}
    with (
        save_names(tmp_path, hf_names(ARCH) | extra) as reader,
        pytest.raises(UserError, match=r"model\.extra\.4, \.\.\. \(7 in all\)"),
    ):
        check_complete(reader, ARCH)


def test_ignorable_tensors_are_accepted(tmp_path: Path) -> None:
    spare = {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    with save_names(tmp_path, hf_names(ARCH) | spare) as reader:
        check_complete(reader, ARCH)
    untied = replace(ARCH, tie_word_embeddings=False)
    with save_names(tmp_path, hf_names(ARCH)) as reader, pytest.raises(UserError, match=r"lm_head\.weight"):
        check_complete(reader, untied)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        SafetensorsReader(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(UserError, match="not a safetensors index"):
        SafetensorsReader(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors", "b": "part.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks part\.safetensors"):
        SafetensorsReader(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "part.safetensors")
    with SafetensorsReader(tmp_path) as reader:
        assert reader.get_slice("a")[0:1].tolist() == [1.0]
        for name, message in (("b", "which the index promises"), ("c", "has no tensor c")):
            with pytest.raises(UserError, match=message):
                reader.get_slice(name)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        SafetensorsReader(tmp_path)


def test_shards_respect_the_limit_and_replace_earlier_weights(tmp_path: Path) -> None:
    tensors = {name: torch.full((4,), float(i)) for i, name in enumerate("abcde")}  # 16 bytes each
    write_safetensors(tmp_path, tensors.items(), max_shard_bytes=32)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "model.safetensors.index.json"]
    assert [sorted(load_file(tmp_path / file)) for file in files] == [["a", "b"], ["c", "d"], ["e"]]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 80}
    assert index["weight_map"] == dict(zip("abcde", [files[0]] * 2 + [files[1]] * 2 + [files[2]]))
    with SafetensorsReader(tmp_path) as reader:
        assert reader.names() == set("abcde") and reader.get_slice("d")[0:4].tolist() == [3.0] * 4

    write_safetensors(tmp_path, [("z", torch.ones(1, dtype=torch.bfloat16))])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failure_leaves_the_earlier_weights(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "b", torch.ones(4)
        raise RuntimeError("rank 1 died")

    write_safetensors(tmp_path, [("a", torch.ones(4))])
    with pytest.raises(RuntimeError, match="rank 1 died"):
        write_safetensors(tmp_path, broken(), max_shard_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == {"a"}


def test_writing_is_bounded_by_one_shard(tmp_path: Path) -> None:
    """When the third tensor is drawn, the first shard is on disk already."""

    def stream() -> Iterator[tuple[str, Tensor]]:
        for i in range(3):
            written = sum(path.stat().st_size > 0 for path in tmp_path.glob(".writing-*/*"))
            assert written == max(i - 1, 0)
            yield str(i), torch.ones(4)

    write_safetensors(tmp_path, stream(), max_shard_bytes=16)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


def test_written_weights_are_as_readable_as_other_files(tmp_path: Path) -> None:
    """A rollout server may run as another user."""
    (tmp_path / "ordinary").touch()
    write_safetensors(tmp_path, [("a", torch.ones(1))])
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
