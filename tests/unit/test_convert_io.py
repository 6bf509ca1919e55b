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

from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.mapping import hf_tensors
from chord_megatron.weights.names import list_names
from chord_megatron.weights.safetensors_io import SafetensorsReader, check_complete
from chord_megatron.weights.safetensors_writer import write_safetensors
from chord_megatron.weights.schema import TensorSpec

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
SHAPES = {name: spec.shape for name, spec in hf_tensors(ARCH, torch.float32).items()}
INDEX = "model.safetensors.index.json"


def save_names(directory: Path, names: set[str]) -> SafetensorsReader:
    save_file({name: torch.zeros(SHAPES.get(name, (1,))) for name in names}, directory / "model.safetensors")
    return SafetensorsReader(directory)


def write(directory: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 5 * 10**9) -> None:
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(directory, specs, tensors.items(), max_shard_bytes)


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        SafetensorsReader(directory)
    return str(error.value)


def test_names_are_listed_in_ranges():
    layers = [f"layers.{layer}.mlp.{part}.weight" for layer in (0, 1, 2, 5) for part in ("up", "down")]
    assert list_names([*layers, "norm"]) == "layers.{0-2,5}.mlp.down.weight, layers.{0-2,5}.mlp.up.weight, norm (9)"
    experts = {f"layers.{layer}.experts.{expert}" for layer in (3, 4) for expert in range(2)}
    assert list_names(experts) == "layers.{3-4}.experts.{0-1} (4)"
    assert list_names(experts - {"layers.4.experts.1"}) == (
        "layers.3.experts.0, layers.3.experts.1, layers.4.experts.0 (3)"
    )
    assert list_names({"layers.1.a", "layers.1.b"}) == "layers.1.a, layers.1.b (2)"
    assert list_names({"layers.1.{a}", "{}"}) == "layers.1.{a}, {} (2)"


def test_missing_tensors_are_listed(tmp_path: Path) -> None:
    with (
        save_names(tmp_path, SHAPES.keys() - {"model.norm.weight"}) as reader,
        pytest.raises(UserError, match=r"lacks tensors .*: model\.norm\.weight \(1\)"),
    ):
        check_complete(reader, ARCH)


def test_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    extra = {f"model.extra.{i}" for i in range(7)}
    with (
        save_names(tmp_path, SHAPES.keys() | extra) as reader,
        pytest.raises(UserError, match=r"does not: model\.extra\.\{0-6\} \(7\)"),
    ):
        check_complete(reader, ARCH)


def test_ignorable_tensors_are_accepted(tmp_path: Path) -> None:
    spare = {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    with save_names(tmp_path, SHAPES.keys() | spare) as reader:
        check_complete(reader, ARCH)
    untied = replace(ARCH, tie_word_embeddings=False)
    with save_names(tmp_path, {*SHAPES}) as reader, pytest.raises(UserError, match=r"lm_head\.weight"):
        check_complete(reader, untied)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} has neither model.safetensors nor {INDEX}; save the model with save_pretrained."
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{}", "is not a safetensors index"),
        ('{"weight_map": 1}', "is not a safetensors index"),
        ('{"weight_map": {"a": 3}}', "is not a safetensors index"),
        ("[]", "does not hold a JSON object"),
        ('{"weight_map": {"a"', "is not valid JSON (Expecting ':' delimiter: line 1 column 20 (char 19))"),
        ("", "is not valid JSON (Expecting value: line 1 column 1 (char 0))"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / INDEX).write_text(text)
    assert refusal(tmp_path).removesuffix(".") == f"{tmp_path / INDEX} {what}; download it again"


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "..", "a/b"])
def test_an_index_must_name_files_beside_it(tmp_path: Path, file: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    assert refusal(tmp_path) == (
        f"{tmp_path / INDEX} names the file {file!r}, which is not beside it; download the model again."
    )


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}))
    assert refusal(tmp_path) == f"{tmp_path} lacks 1.safetensors; download the model again."
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    assert refusal(tmp_path) == (
        f"the files in {tmp_path} lack b (1), which the index promises; download the model again."
    )
    save_file({name: torch.ones(2) for name in "abcd"}, tmp_path / "1.safetensors")
    assert refusal(tmp_path) == (f"{tmp_path / INDEX} lacks c, d (2), which the files hold; download the model again.")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "2.safetensors")
    assert refusal(tmp_path) == (
        f"{tmp_path / '2.safetensors'} holds a, and so does 1.safetensors; save the model with save_pretrained."
    )


@pytest.mark.parametrize("keep", [0, 7, 30, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(tmp_path)
    assert message.startswith(f"{path} is not a complete safetensors file (")
    assert message.endswith("; download it again.")


def test_a_header_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((8).to_bytes(8, "little") + b"not json")
    assert refusal(tmp_path).startswith(f"{path} is not a complete safetensors file (")


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    assert refusal(tmp_path) == f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there."


def test_tensors_and_their_specs_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6).view(3, 2).bfloat16()}, tmp_path / "model.safetensors")
    with SafetensorsReader(tmp_path) as reader:
        assert reader.names() == {"a"}
        assert reader.spec("a") == TensorSpec(torch.bfloat16, (3, 2))
        assert reader.get_slice("a")[1:2].tolist() == [[2.0, 3.0]]
        with pytest.raises(UserError, match="has no tensor c; download the model again"):
            reader.get_slice("c")


def test_shards_respect_the_limit_and_replace_earlier_weights(tmp_path: Path) -> None:
    tensors = {name: torch.full((4,), float(i)) for i, name in enumerate("abcde")}  # 16 bytes each
    write(tmp_path, tensors, max_shard_bytes=32)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, INDEX]
    assert [sorted(load_file(tmp_path / file)) for file in files] == [["a", "b"], ["c", "d"], ["e"]]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 80}
    assert index["weight_map"] == dict(zip("abcde", [files[0]] * 2 + [files[1]] * 2 + [files[2]]))
    with SafetensorsReader(tmp_path) as reader:
        assert reader.names() == set("abcde") and reader.get_slice("d")[0:4].tolist() == [3.0] * 4

    write(tmp_path, {"z": torch.ones(1, dtype=torch.bfloat16)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_every_dtype_and_shape_is_written_bit_by_bit(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.tensor([1.5, -2.0, float("nan")], dtype=torch.bfloat16),
        "scalar": torch.tensor(3.25),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(12.0).view(3, 4).t(),
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "double": torch.tensor([[1e-300]], dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "half": torch.tensor([0.5], dtype=torch.float16),
        "long": torch.tensor([2**40]),
    }
    write(tmp_path, tensors)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].nan_to_num(), tensor.nan_to_num())
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert all(entry["data_offsets"][0] % tensors[name].itemsize == 0 for name, entry in header.items())


def test_a_failure_leaves_the_earlier_weights(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "b", torch.ones(4)
        raise RuntimeError("rank 1 died")

    write(tmp_path, {"a": torch.ones(4)})
    specs = {name: TensorSpec(torch.float32, (4,)) for name in "bc"}
    with pytest.raises(RuntimeError, match="rank 1 died"):
        write_safetensors(tmp_path, specs, broken(), max_shard_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == {"a"}


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"a": torch.ones(4)}, r"planned and not written: layer\.\{0-1\} \(2\)"),
        ({"x": torch.ones(4)}, "x is not a planned tensor"),
        ({"a": torch.ones(2, 2)}, r"a is float32 \[2, 2\] and was planned as float32 \[4\]"),
        ({"a": torch.ones(4).half()}, r"a is float16 \[4\] and was planned as float32 \[4\]"),
    ],
)
def test_a_stream_must_be_the_planned_one(tmp_path: Path, stream: dict[str, Tensor], message: str) -> None:
    specs = {name: TensorSpec(torch.float32, (4,)) for name in ("a", "layer.0", "layer.1")}
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path, specs, stream.items())
    assert list(tmp_path.iterdir()) == []
    twice = [("a", torch.ones(4)), ("a", torch.ones(4))]
    with pytest.raises(ValueError, match="a is written twice"):
        write_safetensors(tmp_path, specs, twice)


def test_a_tensor_is_on_disk_before_the_next_is_drawn(tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[str, Tensor]]:
        for i in range(3):
            data = b"".join(path.read_bytes() for path in sorted(tmp_path.glob(".writing-*/*")))
            assert data.count(b"written!") == 8 * i
            yield str(i), torch.frombuffer(bytearray(b"written!" * 8), dtype=torch.uint8)

    specs = {str(i): TensorSpec(torch.uint8, (64,)) for i in range(3)}
    write_safetensors(tmp_path, specs, stream(), max_shard_bytes=64)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


def test_written_weights_are_as_readable_as_other_files(tmp_path: Path) -> None:
    """A rollout server may run as another user."""
    (tmp_path / "ordinary").touch()
    write(tmp_path, {"a": torch.ones(1)})
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
