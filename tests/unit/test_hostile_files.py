"""Files made to take all memory or all time: each is refused in a process that has not much of either."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType

from chord_megatron.checkpoints.conversion import hf_to_megatron
from tests.tiny_families import YARN_ROPE, write_model
from tests.tiny_tokenizer import write_tokenizer

pytestmark = pytest.mark.attack

WORKER = Path(__file__).with_name("bounded_worker.py")
SECONDS = 300  # each takes one; what is not refused takes years


def refusal(*arguments: object, code: int = 2) -> str:
    """The one sentence that a command ends with."""
    outcome = forked.run(WORKER, *arguments, timeout_seconds=SECONDS)
    assert outcome.code == code and len(outcome.errors) == 1, outcome.stderr[-3000:]
    assert "Traceback" not in outcome.stderr
    return outcome.errors[0]


def nested(innermost: Any = (), levels: int = 60) -> Any:
    """A tuple of two of the same, and so on: small in a file, endless for whoever walks through it."""
    for _ in range(levels):
        innermost = (innermost, innermost)
    return innermost


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "hf", "llama", num_hidden_layers=2, hidden_size=16)
    write_tokenizer(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron")
    return folder


# --- .metadata ------------------------------------------------------------------------------------------------------


class Call:
    """Pickles into a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def hash_of(value: Any) -> bytes:
    """The opcodes of a dictionary with this key."""
    body = pickle.dumps(value, 2)
    return b"\x80\x02}" + body[2:-1] + b"Ns."


def nested_indices() -> Any:
    index: Any = MetadataIndex("a")
    for _ in range(60):
        outer = MetadataIndex("a")
        object.__setattr__(outer, "fqn", index)
        object.__setattr__(outer, "offset", index)
        index = outer
    return index


def shared_chunks(sizes: list[int], size: list[int], number: int) -> Metadata:
    """Many tensors with one list of many chunks."""
    chunk = ChunkStorageMetadata(torch.Size([0] * len(sizes)), torch.Size(sizes))
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), [chunk] * number)
    names = [f"decoder.layers.{layer}.mlp.linear_fc1.weight" for layer in range(number)]
    return Metadata({name: TensorStorageMetadata(entry.properties, entry.size, entry.chunks) for name in names})


METADATA: dict[str, Callable[[], bytes]] = {
    "a key of nested tuples": lambda: hash_of(nested()),
    "a key of nested indices": lambda: hash_of(nested_indices()),
    "a set of nested tuples": lambda: b"\x80\x04\x8f(" + pickle.dumps(nested(), 2)[2:-1] + b"\x90.",
    "a frozen set of nested tuples": lambda: b"\x80\x04(" + pickle.dumps(nested(), 2)[2:-1] + b"\x91.",
    "a choice of nested tuples": lambda: pickle.dumps(Call(WriteItemType, nested())),
    "a choice of nested indices": lambda: pickle.dumps(Call(WriteItemType, nested_indices())),
    "an array of 8 GB": lambda: b"\x80\x05\x96" + (8 * 10**9).to_bytes(8, "little") + b".",
    "a frame of 8 GB": lambda: b"\x80\x04\x95" + (8 * 10**9).to_bytes(8, "little") + b".",
    "a memo of 2^31 places": lambda: b"\x80\x02]r\xff\xff\xff\x7f.",
    "chunks that tensors share": lambda: pickle.dumps(shared_chunks([1, 1], [30000, 1], 30000)),
}


@pytest.mark.parametrize("attack", METADATA)
def test_metadata_take_time_and_memory_by_their_length(
    models: Path, tmp_path: Path, attack: str, measure: Callable[[str, int], None]
) -> None:
    measure("hostile files, all refused within bounds", 1)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / ".metadata").write_bytes(METADATA[attack]())
    assert refusal("convert", "megatron-to-hf", folder, tmp_path / "out", "--hf-config", models / "hf") == (
        f"error: the .metadata file of {folder} is damaged; copy the checkpoint again"
    )


def test_a_chunk_lies_within_its_tensor(models: Path, tmp_path: Path) -> None:
    """One of no numbers may say that it holds a part of each of 2^40 layers."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(models / "megatron", folder)
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301, our own
    key = next(key for key in metadata.state_dict_metadata if key.endswith("linear_fc2.weight"))
    entry = metadata.state_dict_metadata[key]
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2**40, 0]))
    entry.chunks.append(chunk)
    metadata.storage_data[MetadataIndex(key, chunk.offsets)] = _StorageInfo("__0_0.distcp", 0, 1)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert refusal("convert", "megatron-to-hf", folder, tmp_path / "out") == (
        f"error: the .metadata file of {folder} is damaged; copy the checkpoint again"
    )


# --- common.pt ------------------------------------------------------------------------------------------------------


def archive(path: Path, content: bytes, *, compression: int = zipfile.ZIP_STORED, zeros: int = 0) -> None:
    """What torch.save writes, with a storage of that many bytes."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("common/data.pkl", content)
        file.writestr("common/version", "3\n")
        file.writestr("common/byteorder", "little")
        with file.open("common/data/0", "w", force_zip64=True) as record:
            for _ in range(zeros // 10**6):
                record.write(bytes(10**6))


def overlapping(path: Path) -> None:
    """Two hundred tensors of 10 MB in a file of 10 MB: all of the same bytes."""
    archive(path, b"\x80\x02}" + b"".join(map(tensor, range(200))) + b".", zeros=10**7)
    with zipfile.ZipFile(path, "a") as file:
        first = file.getinfo("common/data/0")
        for number in range(1, 200):
            again = zipfile.ZipInfo(f"common/data/{number}")
            for name in ("compress_type", "header_offset", "CRC", "compress_size", "file_size", "flag_bits"):
                setattr(again, name, getattr(first, name))
            file.filelist.append(again)
        file.writestr("common/.data/serialization_id", "0")  # so that the directory is written again


def tensor(number: int, size: int = 10**7) -> bytes:
    """The item of a dictionary: a tensor of a record."""
    key, length = str(number).encode(), size.to_bytes(4, "little")
    return (
        b"M%bctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nByteStorage\nX%b%bX\x03\x00\x00\x00cpu"
        b"J%btQK\x00J%b\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRs"
        % (number.to_bytes(2, "little"), len(key).to_bytes(4, "little"), key, length, length)
    )


EIGHT_BILLIONS = b"\x8a\x05\x00\x50\xd6\xdc\x01"
COMMON: dict[str, Callable[[Path], None]] = {
    "2 MB that become 2 GB": lambda path: archive(
        path, b"\x80\x02}" + tensor(0, 2 * 10**9) + b".", compression=zipfile.ZIP_DEFLATED, zeros=2 * 10**9
    ),
    "a pickle that becomes 300 MB": lambda path: archive(
        path, b"\x80\x02" + b"]" * 3 * 10**8 + b".", compression=zipfile.ZIP_DEFLATED
    ),
    "the same bytes for many tensors": overlapping,
    "an array of 8 GB": lambda path: archive(path, b"\x80\x02cbuiltins\nbytearray\n%b\x85R." % EIGHT_BILLIONS),
    "a tensor of 32 GB": lambda path: archive(path, b"\x80\x02ctorch\nTensor\n%b\x85\x81." % EIGHT_BILLIONS),
    "a key of nested tuples": lambda path: archive(path, hash_of(nested())),
}


@pytest.mark.parametrize("attack", COMMON)
def test_a_common_state_takes_time_and_memory_by_its_length(
    models: Path, tmp_path: Path, attack: str, measure: Callable[[str, int], None]
) -> None:
    measure("hostile files, all refused within bounds", 1)
    folder = tmp_path / "checkpoint"
    shutil.copytree(models / "megatron", folder)
    COMMON[attack](folder / "common.pt")
    assert refusal("common_state", folder, code=1).startswith(f"error: the common state of {folder} is damaged or")
    if "GB" not in attack[2:]:  # those name what is no plain value, which is all that a conversion reads
        outcome = refusal("convert", "megatron-to-hf", folder, tmp_path / "out")
        assert outcome.startswith(f"error: the common state of {folder} is damaged (")


@pytest.mark.parametrize("attack", ["compressed", "a key of nested tuples", "an array of 8 GB"])
def test_a_tensor_of_a_checkpoint_takes_time_and_memory_by_its_length(
    models: Path, tmp_path: Path, attack: str, measure: Callable[[str, int], None]
) -> None:
    """Each is a file of torch.save within a larger one."""
    measure("hostile files, all refused within bounds", 1)
    folder, file = tmp_path / "checkpoint", tmp_path / "file"
    shutil.copytree(models / "megatron", folder)
    if attack == "compressed":
        archive(file, b"\x80\x02" + b"]" * 3 * 10**8 + b".", compression=zipfile.ZIP_DEFLATED)
    else:
        COMMON[attack](file)
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301, our own
    index = next(index for index in metadata.storage_data if index.fqn == "decoder.final_layernorm.weight")
    metadata.storage_data[index] = _StorageInfo("file", 0, file.stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    shutil.copyfile(file, folder / "file")
    message = refusal("convert", "megatron-to-hf", folder, tmp_path / "out")
    assert message.startswith(f"error: {folder}/file is damaged at decoder.final_layernorm.weight (")


# --- config.json ----------------------------------------------------------------------------------------------------

CONFIGS = {
    "layers": ("llama", {"num_hidden_layers": 10**9}),
    "the most layers": ("llama", {"num_hidden_layers": 10_000}),
    "experts": ("qwen3_moe", {"num_experts": 10**9}),
    "layers of experts": ("qwen3_moe", {"num_hidden_layers": 10_000, "num_experts": 10_000}),
    "dense layers by name": ("qwen3_moe", {"num_hidden_layers": 1000, "mlp_only_layers": [5] * 10**6}),
    "width": ("llama", {"hidden_size": 10**9}),
    "width of the MLP": ("llama", {"intermediate_size": 10**9}),
    "vocabulary": ("llama", {"vocab_size": 10**9}),
    "attention heads": ("llama", {"num_attention_heads": 10**9, "head_dim": 4}),
    "size of a head": ("llama", {"head_dim": 10**9}),
    "width of an expert": ("qwen3_moe", {"moe_intermediate_size": 10**9}),
    "ranks of latent attention": ("deepseek_v3", {"q_lora_rank": 10**9, "kv_lora_rank": 10**9}),
    "positions of YaRN": ("deepseek_v3", {"rope_parameters": YARN_ROPE | {"original_max_position_embeddings": 10**9}}),
}
OF_THE_DOCTOR = ("layers", "the most layers", "layers of experts", "width")  # who looks at the machine, too, for long


@pytest.mark.parametrize("attack", CONFIGS)
def test_a_config_takes_time_and_memory_by_its_length(
    tmp_path: Path, attack: str, measure: Callable[[str, int], None]
) -> None:
    """In each command: the tables of names grow with layers and experts, the model with all its sizes."""
    measure("hostile files, all refused within bounds", 1)
    family, keys = CONFIGS[attack]
    model = tmp_path / "model"
    write_model(model, family, num_hidden_layers=2, hidden_size=16)
    write_tokenizer(model)
    change_config(model, keys)
    reasons = ("error: the checkpoint lacks tensors", "error: wrong shapes: ", f"error: {model}/config.json: ")
    if attack == "attention heads":
        reasons += (f"error: {model} has no tokenizer",)  # transformers looks at config.json, too
    assert refusal("convert", "hf-to-megatron", model, tmp_path / "out").startswith(reasons)
    refused_by_a_run(model, tmp_path, reasons)
    if attack in OF_THE_DOCTOR:
        outcome = forked.run(WORKER, "doctor", tmp_path / "run.yaml", timeout_seconds=SECONDS)
        assert outcome.code in (1, 2) and "Traceback" not in outcome.stderr, outcome.stderr[-3000:]


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size"])
def test_a_config_that_contradicts_a_checkpoint_takes_no_memory(models: Path, tmp_path: Path, key: str) -> None:
    folder = shutil.copytree(models / "megatron", tmp_path / "megatron")
    change_config(folder, {"head_dim": 4, key: 10**9})
    reasons = (f"error: the checkpoint {folder} is not the llama model of this config.json: wrong shapes ",)
    assert refusal("convert", "megatron-to-hf", folder, tmp_path / "out").startswith(reasons)
    refused_by_a_run(folder, tmp_path, reasons)


def test_tensors_are_no_larger_than_their_files(models: Path, tmp_path: Path) -> None:
    """config.json and .metadata agree about a vocabulary of 10^9."""
    folder = shutil.copytree(models / "megatron", tmp_path / "megatron")
    change_config(folder, {"vocab_size": 10**9})
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301, our own
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        entry = metadata.state_dict_metadata[key]
        entry.size = torch.Size([10**9, 16])
        entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), entry.size)]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    reasons = (f"error: the .metadata file of {folder} is damaged; copy the checkpoint again",)
    assert refusal("convert", "megatron-to-hf", folder, tmp_path / "out").startswith(reasons)
    refused_by_a_run(folder, tmp_path, reasons)


def test_files_are_not_read_twice(models: Path, tmp_path: Path) -> None:
    """All tensors of 1000 layers in the same bytes."""
    folder = shutil.copytree(models / "megatron", tmp_path / "megatron")
    change_config(folder, {"num_hidden_layers": 1000})
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301, our own
    for key, entry in [*metadata.state_dict_metadata.items()]:
        for layer in range(2, 1000) if ".layers.0." in key else ():
            copy = key.replace(".layers.0.", f".layers.{layer}.")
            metadata.state_dict_metadata[copy] = entry
            for chunk in entry.chunks:
                info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                metadata.storage_data[MetadataIndex(copy, chunk.offsets)] = info
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    reasons = (f"error: the .metadata file of {folder} is damaged; copy the checkpoint again",)
    assert refusal("convert", "megatron-to-hf", folder, tmp_path / "out").startswith(reasons)
    refused_by_a_run(folder, tmp_path, reasons)


def change_config(model: Path, keys: dict[str, Any]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | keys))


def refused_by_a_run(model: Path, folder: Path, reasons: tuple[str, ...]) -> None:
    """With one of the reasons; validate, which reads config.json alone, has nothing to take memory for."""
    (folder / "prompts.jsonl").write_text('{"prompt": "1", "answer": "2"}\n')
    run = folder / "run.yaml"
    run.write_text(
        f"model: {{path: {model}, dtype: float32}}\n"
        f"data: {{dataset: {folder}/prompts.jsonl, prompt_format: text, max_prompt_length: 8}}\n"
        f"train: {{output_dir: {folder}/run, global_batch_size: 8, train_iters: 1}}\n"
        "chord: {chord_mu_peak: 0, chord_mu_valley: 0}\n"
        "rollout: {max_completion_length: 4}\n"
    )
    assert refusal("train", run).startswith(reasons)
    outcome = forked.run(WORKER, "validate", run, timeout_seconds=SECONDS)
    assert outcome.code in (0, 2) and "Traceback" not in outcome.stderr, outcome.stderr[-3000:]
