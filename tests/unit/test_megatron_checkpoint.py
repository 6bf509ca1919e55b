"""Offline conversion: exactness, casts, what a Megatron folder may be, and every way in which it is refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from chord_megatron.checkpoints import conversion
from chord_megatron.checkpoints import writer as megatron_writer
from chord_megatron.checkpoints.reader import MegatronReader
from chord_megatron.system import atomic as new_directory
from chord_megatron.system.errors import UserError
from chord_megatron.weights import safetensors_writer
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.hf_config import read_architecture

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def model(tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 in bfloat16, with something beside its weights."""
    root = shutil.copytree(tiny_models("qwen2", dtype="bfloat16"), tmp_path_factory.mktemp("hf") / "model")
    (root / "tokenizer.json").write_text("{}")
    (root / "README.md").write_text("not copied")
    return root


@pytest.fixture(scope="module")
def megatron(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("megatron") / "model"
    conversion.hf_to_megatron(model, root)
    return root


@pytest.fixture
def damaged(megatron: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(megatron, tmp_path / "damaged")


def edit_metadata(directory: Path, edit: Callable[[Metadata], object]) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())  # noqa: S301, our own
    edit(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    wrong = [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])]
    assert wrong == []


def refusal(convert: Callable[..., object], source: Path, target: Path, **options: Any) -> str:
    """The error's sentence; nothing is left beside the target."""
    target.parent.mkdir(exist_ok=True)
    before = sorted(target.parent.iterdir())
    with pytest.raises(UserError) as error:
        convert(source, target, **options)
    assert sorted(target.parent.iterdir()) == before
    return str(error.value)


def to_hf_refusal(source: Path, tmp_path: Path, **options: Any) -> str:
    return refusal(conversion.megatron_to_hf, source, tmp_path / "out" / "hf", **options)


def to_megatron_refusal(source: Path, tmp_path: Path, **options: Any) -> str:
    return refusal(conversion.hf_to_megatron, source, tmp_path / "out" / "megatron", **options)


def test_files_and_padding(model: Path, megatron: Path):
    assert sorted(path.name for path in megatron.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "common.pt",
        "config.json",
        "generation_config.json",
        "metadata.json",
        "tokenizer.json",
    ]
    assert (megatron / "config.json").read_bytes() == (model / "config.json").read_bytes()
    metadata = pickle.loads((megatron / ".metadata").read_bytes())  # noqa: S301, our own
    assert metadata.state_dict_metadata[EMBEDDING].size == (256, 48)  # 131 rows and padding
    common = torch.load(megatron / "common.pt", weights_only=True)
    assert common["content_metadata"]["non_homogeneous_layers"] is True
    assert common["checkpoint_version"] == 3.0


def test_large_vocabularies_are_written_in_pieces(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(megatron_writer, "_PIECE_BYTES", 256 * 48 * 2 // 5)  # 8 pieces, 3 of padding only
    monkeypatch.setattr(megatron_writer, "_FILE_BYTES", 50_000)
    conversion.hf_to_megatron(model, tmp_path / "megatron", verify=False)
    metadata = pickle.loads((tmp_path / "megatron" / ".metadata").read_bytes())  # noqa: S301, our own
    chunks = metadata.state_dict_metadata[EMBEDDING].chunks
    assert [tuple(chunk.offsets) for chunk in chunks] == [(32 * i, 0) for i in range(8)]
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) == 4
    conversion.megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", max_shard_bytes=20_000)
    assert_same(tensors(tmp_path / "hf"), tensors(model))
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 10


def test_mixed_dtypes_stay_where_they_are_whole_parameters(model: Path, tmp_path: Path):
    source = shutil.copytree(model, tmp_path / "source")
    mixed = tensors(model)
    for name in mixed:
        if "norm" in name:
            mixed[name] = mixed[name].float()
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    conversion.hf_to_megatron(source, tmp_path / "megatron")
    conversion.megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert_same(tensors(tmp_path / "hf"), mixed)

    mixed["model.layers.1.mlp.up_proj.weight"] = mixed["model.layers.1.mlp.up_proj.weight"].float()
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    assert to_megatron_refusal(source, tmp_path) == (
        "model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight (2) have different dtypes, "
        "and are one tensor in Megatron; choose one with --dtype"
    )
    conversion.hf_to_megatron(source, tmp_path / "float32", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_casts_reach_weights_and_config(model: Path, tmp_path: Path, dtype: torch.dtype):
    conversion.hf_to_megatron(model, tmp_path / "megatron", dtype=dtype)
    conversion.megatron_to_hf(tmp_path / "megatron", tmp_path / "there")
    there = {name: tensor.to(dtype) for name, tensor in tensors(model).items()}
    assert_same(tensors(tmp_path / "there"), there)
    conversion.megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype=torch.bfloat16)
    assert_same(tensors(tmp_path / "back"), {name: tensor.to(torch.bfloat16) for name, tensor in there.items()})
    for folder, name in (("megatron", dtype), ("there", dtype), ("back", torch.bfloat16)):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["dtype"] == str(name).removeprefix("torch.")


def test_expert_biases_stay_float32(tiny_models: Callable[..., Path], tmp_path: Path):
    model = tiny_models("deepseek_v3", dtype="bfloat16")
    conversion.hf_to_megatron(model, tmp_path / "megatron", dtype=torch.float16)
    conversion.megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in tensors(tmp_path / "hf").items()}
    biases = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert biases == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2, 3)}
    assert_same({n: tensors(tmp_path / "hf")[n] for n in biases}, {n: tensors(model)[n] for n in biases})


def test_numbers_too_large_for_float16_are_refused(model: Path, tmp_path: Path):
    source = shutil.copytree(model, tmp_path / "source")
    large = tensors(model)
    large["model.norm.weight"][3] = 1e6
    save_file(large, source / "model.safetensors")
    message = to_megatron_refusal(source, tmp_path, dtype=torch.float16)
    assert message == (
        "decoder.final_layernorm.weight holds numbers that float16 cannot; use --dtype bfloat16 or float32"
    )


@pytest.mark.parametrize(("tracker", "folder"), [("100\n", "iter_0000100"), ("release", "release")])
def test_megatron_lm_folders_and_their_iterations_are_found(
    megatron: Path, model: Path, tmp_path: Path, tracker: str, folder: str
):
    shutil.copytree(megatron, tmp_path / "run" / folder)
    (tmp_path / "run" / folder / "config.json").unlink()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert to_hf_refusal(tmp_path / "run", tmp_path) == (
        f"{tmp_path / 'run'} has no config.json; name the Hugging Face folder of the model with --hf-config"
    )
    for number, source in enumerate((tmp_path / "run", tmp_path / "run" / folder)):
        conversion.megatron_to_hf(source, tmp_path / f"hf{number}", hf_config=model)
        assert_same(tensors(tmp_path / f"hf{number}"), tensors(model))


def test_other_folders_and_formats_are_refused(megatron: Path, damaged: Path, model: Path, tmp_path: Path):
    def message(source: Path) -> str:
        return to_hf_refusal(source, tmp_path, hf_config=model)

    remedy = "convert it with Megatron-LM's --ckpt-convert-format torch_dist"
    run = tmp_path / "run"
    assert message(run) == f"the checkpoint folder {run} is not a directory"
    run.mkdir()
    assert message(run) == (
        f"{run} is not a Megatron checkpoint: it has neither .metadata nor latest_checkpointed_iteration.txt"
    )
    for step in (9, 10):
        (run / "checkpoints" / f"step_{step}").mkdir(parents=True)
        (run / "checkpoints" / f"step_{step}" / ".metadata").touch()
    suggestion = f"; did you mean {run}/checkpoints/step_10?"
    for wrong in (run, run / "checkpoints", run / "checkpoints" / "step_11", run / "step_10"):
        assert message(wrong).endswith(suggestion)
    shutil.rmtree(run / "checkpoints")
    tracker = run / "latest_checkpointed_iteration.txt"
    tracker.write_text("7")
    assert message(run) == (
        f"{run} lacks iter_0000007, which latest_checkpointed_iteration.txt names; name an iteration folder"
    )
    (run / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
    assert message(run) == f'{run / "iter_0000007"} is in Megatron-LM\'s old "torch" format; {remedy}'
    tracker.write_text("../../etc")
    assert message(run) == f"{tracker} holds '../../etc', neither a number nor `release`; name an iteration folder"
    (damaged / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert message(damaged) == f"{damaged} is in the format 'zarr'; {remedy}"
    assert to_hf_refusal(megatron, tmp_path, hf_config=run) == (
        f"--hf-config {run} has no config.json; name the Hugging Face folder of the model"
    )


def test_missing_and_unknown_parameters_are_all_named(damaged: Path, tmp_path: Path):
    def rename(metadata: Metadata) -> None:
        for layer in (0, 1, 3):
            key = f"decoder.layers.{layer}.mlp.linear_fc2.weight"
            metadata.state_dict_metadata[key.replace("fc2", "fc3")] = metadata.state_dict_metadata.pop(key)

    edit_metadata(damaged, rename)
    assert to_hf_refusal(damaged, tmp_path) == (
        f"the checkpoint {damaged} is not the qwen2 model of this config.json: "
        "missing decoder.layers.{0-1,3}.mlp.linear_fc2.weight (3); "
        "unknown decoder.layers.{0-1,3}.mlp.linear_fc3.weight (3); "
        "use the config.json that belongs to these weights"
    )


def test_numbers_that_are_no_weights_are_refused_where_training_reads_them_too(damaged: Path):
    """Training and `convert` open a checkpoint through the same reader, which read int8 as weights."""

    def quantize(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata[EMBEDDING]
        entry.properties.dtype = torch.int8

    edit_metadata(damaged, quantize)
    with pytest.raises(UserError) as error:
        MegatronReader(damaged, read_architecture(damaged))
    assert str(error.value) == (
        f"{EMBEDDING} (1) hold int8 numbers, which are no weights; use the unquantized checkpoint"
    )


def test_wrong_shapes_are_named(damaged: Path, tmp_path: Path):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"intermediate_size": 64, "num_hidden_layers": 1}))

    def keep_one_layer(metadata: Metadata) -> None:
        for key in [key for key in metadata.state_dict_metadata if ".layers." in key and ".layers.0." not in key]:
            del metadata.state_dict_metadata[key]

    edit_metadata(damaged, keep_one_layer)
    assert "wrong shapes decoder.layers.0.mlp.linear_fc1.weight [160, 48] instead of [128, 48], " in (
        to_hf_refusal(damaged, tmp_path)
    )
    hf = shutil.copytree(damaged, tmp_path / "hf_with_wrong_config")
    assert "linear_fc2.weight [48, 80] instead of [48, 64]; use the config.json" in to_hf_refusal(hf, tmp_path)


def test_wrong_hugging_face_shapes_are_all_named(model: Path, tmp_path: Path):
    source = shutil.copytree(model, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 100, "intermediate_size": 64}))
    message = to_megatron_refusal(source, tmp_path)
    assert message.startswith("wrong shapes: model.embed_tokens.weight [131, 48] instead of [100, 48], ")
    assert message.count("instead of") == 2 + 4 * 3
    assert message.endswith("; use the config.json that belongs to these weights")


def test_missing_and_extra_hugging_face_tensors_are_named(model: Path, tmp_path: Path):
    source = shutil.copytree(model, tmp_path / "source")
    weights = tensors(model)
    extra = weights.pop("model.norm.weight")
    save_file(weights, source / "model.safetensors")
    assert "lacks tensors of a qwen2 model: model.norm.weight (1)" in to_megatron_refusal(source, tmp_path)
    save_file(tensors(model) | {"model.layers.0.extra": extra}, source / "model.safetensors")
    assert "that a qwen2 model does not: model.layers.0.extra (1)" in to_megatron_refusal(source, tmp_path)


def test_quantized_tensors_are_refused(model: Path, tmp_path: Path):
    source = shutil.copytree(model, tmp_path / "source")
    weights = tensors(model)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights, source / "model.safetensors")
    assert to_megatron_refusal(source, tmp_path) == (
        "model.norm.weight (1) hold float8_e4m3fn numbers, which are no weights; use the unquantized checkpoint"
    )


def test_training_states_are_skipped_and_other_objects_refused(damaged: Path, model: Path, tmp_path: Path):
    def add(*keys: str) -> None:
        edit_metadata(damaged, lambda m: m.state_dict_metadata.update({k: BytesStorageMetadata() for k in keys}))

    add("rng_state/shard_0.0_1.1", "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4", "optimizer.state.x")
    add("rerun_state_machine_state/shard_0_1", "chained_0.optimizer.state")
    conversion.megatron_to_hf(damaged, tmp_path / "hf")
    assert_same(tensors(tmp_path / "hf"), tensors(model))
    add("decoder.layers.0.hook/shard_0_1")
    assert to_hf_refusal(damaged, tmp_path) == (
        f"the checkpoint {damaged} holds pickled objects that are not part of a training state: "
        "decoder.layers.0.hook/shard_0_1 (1); save the model without them"
    )


def test_code_in_the_metadata_does_not_run(damaged: Path, tmp_path: Path):
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    edit_metadata(damaged, lambda metadata: setattr(metadata, "planner_data", Attack()))
    assert to_hf_refusal(damaged, tmp_path) == (
        f"refusing a checkpoint whose .metadata names {os.name}.system: it could run code"
    )
    assert not (tmp_path / "ran").exists()


def test_a_pickled_object_in_place_of_a_tensor_is_refused(damaged: Path, tmp_path: Path):
    """Within the data files, too, only tensors are read."""
    metadata = pickle.loads((damaged / ".metadata").read_bytes())  # noqa: S301, our own
    (info,) = (info for index, info in metadata.storage_data.items() if index.fqn == "decoder.final_layernorm.weight")
    path = damaged / info.relative_path
    content = bytearray(path.read_bytes())
    attack = pickle.dumps(torch.Size) + b"x"
    content[info.offset : info.offset + len(attack)] = attack
    path.write_bytes(content)
    message = to_hf_refusal(damaged, tmp_path)
    assert message == (
        f"{path} is damaged at decoder.final_layernorm.weight (Bad magic number for file header); "
        "copy the checkpoint again"
    )


def test_truncated_and_missing_files_are_named(damaged: Path, tmp_path: Path):
    path = damaged / "__0_0.distcp"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 100)
    assert to_hf_refusal(damaged, tmp_path) == (
        f"{path} is truncated ({size - 100} of {size} bytes); copy the checkpoint again"
    )
    path.unlink()
    assert to_hf_refusal(damaged, tmp_path) == f"{damaged} lacks __0_0.distcp; copy the checkpoint again"
    (damaged / ".metadata").write_bytes(b"\x80")
    assert to_hf_refusal(damaged, tmp_path) == (
        f"the .metadata file of {damaged} is damaged; copy the checkpoint again"
    )


@pytest.mark.parametrize("file", ["../other/__0_0.distcp", "/etc/passwd"])
def test_files_elsewhere_are_not_read(damaged: Path, tmp_path: Path, file: str):
    def point_elsewhere(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = file

    edit_metadata(damaged, point_elsewhere)
    assert to_hf_refusal(damaged, tmp_path) == (
        f"the .metadata file of {damaged} is damaged; copy the checkpoint again"
    )


def test_a_tensor_of_which_a_part_is_missing_is_named(damaged: Path, tmp_path: Path):
    def drop_a_chunk(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata[FC1]
        assert isinstance(entry, TensorStorageMetadata)
        entry.chunks.pop()

    edit_metadata(damaged, drop_a_chunk)
    assert to_hf_refusal(damaged, tmp_path) == f"{damaged} holds only parts of {FC1}; copy the checkpoint again"


def test_existing_targets_stay_as_they_are(model: Path, megatron: Path, tmp_path: Path):
    target = tmp_path / "target"
    target.mkdir()
    for convert, source in ((conversion.hf_to_megatron, model), (conversion.megatron_to_hf, megatron)):
        assert refusal(convert, source, target) == f"{target} exists; remove it or name another folder"
    assert list(target.iterdir()) == []


def test_space_is_checked_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(new_directory.shutil, "disk_usage", lambda path: usage._replace(free=50_000_000))
    assert to_megatron_refusal(model, tmp_path) == (
        f"{tmp_path / 'out'} has 0.1 GB free and 0.0 GB are needed; free some space or name another disk"
    )


def test_a_disk_that_fills_up_leaves_nothing(
    model: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    message = "the disk of {} is full; nothing was written: free some space or name another disk"
    save = torch.save

    def save_to_full_disk(tensor: Tensor, file: Any) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            save(tensor, full)

    monkeypatch.setattr(megatron_writer.torch, "save", save_to_full_disk)
    assert to_megatron_refusal(model, tmp_path) == message.format(tmp_path / "out" / "megatron")

    calls: list[int] = []

    def write_to_full_disk(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        if len(calls) == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    monkeypatch.setattr(safetensors_writer.os, "pwrite", write_to_full_disk)
    assert to_hf_refusal(megatron, tmp_path) == message.format(tmp_path / "out" / "hf")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_nothing(model: Path, megatron: Path, tmp_path: Path, error: type[BaseException]):
    def advance(nbytes: int) -> None:
        raise error

    for convert, source in ((conversion.hf_to_megatron, model), (conversion.megatron_to_hf, megatron)):
        with pytest.raises(error):
            convert(source, tmp_path / "target", progress=conversion.Progress(advance=advance))
        assert list(tmp_path.iterdir()) == []


def test_verifying_finds_a_changed_bit(model: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of what is on disk: it is changed after it was written."""
    write, tell = safetensors_writer.SafetensorsWriter.publish, conversion.copy_model_files

    def publish_changed(self: Any, target: Path) -> None:
        write(self, target)
        flip(target / "model.safetensors")

    def copy_and_change(sources: Iterator[Path], target: Path, arch: ModelArchitecture) -> list[str]:
        left_out = tell(sources, target, arch)
        flip(target / "__0_0.distcp")
        return left_out

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        value = find_value(megatron if path.suffix == ".distcp" else model)
        place = data.index(value)
        data[place] ^= 1
        path.write_bytes(data)

    def find_value(folder: Path) -> bytes:
        with safe_open(model / "model.safetensors", framework="pt") as file:
            return file.get_tensor("model.layers.2.self_attn.o_proj.weight").view(torch.uint8).numpy().tobytes()

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_writer.SafetensorsWriter, "publish", publish_changed)
        assert to_hf_refusal(megatron, tmp_path, verify=True) == (
            "verification failed: what was written differs from the source in "
            "decoder.layers.2.self_attention.linear_proj.weight (1); check disk and memory of this machine, "
            "and convert again"
        )
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "copy_model_files", copy_and_change)
        message = to_megatron_refusal(model, tmp_path, verify=True)
        assert "differs from the source in model.layers.2.self_attn.o_proj.weight (1);" in message
