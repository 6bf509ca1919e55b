"""Reading a checkpoint never runs code that came with it."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from chord_megatron.checkpoints.common_state import read_common_state
from chord_megatron.checkpoints.metadata import refuse_unsafe
from chord_megatron.system.errors import UserError

pytestmark = pytest.mark.attack


class RunsOnLoad:
    """Pickles into a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def checkpoint(path: Path, metadata: object) -> Path:
    """A checkpoint directory with this `.metadata`."""
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def tensor_metadata(dtype: torch.dtype = torch.float32) -> TensorStorageMetadata:
    size = torch.Size([2, 3])
    chunk = ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=size)
    return TensorStorageMetadata(TensorProperties(dtype), size, [chunk])


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        refuse_unsafe(directory)
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_checkpoint_of_tensors_is_accepted(tmp_path: Path, dtype: torch.dtype):
    refuse_unsafe(checkpoint(tmp_path, Metadata({"decoder.weight": tensor_metadata(dtype)})))


@pytest.mark.parametrize("place", ["entry", "planner_data", "storage_data"])
def test_code_in_the_metadata_is_refused_without_running(tmp_path: Path, place: str):
    target = tmp_path / "ran"
    attack = RunsOnLoad(os.system, f"touch {target}")
    if place == "entry":
        metadata = Metadata({"decoder.weight": attack})  # type: ignore[dict-item]
    else:
        metadata = Metadata({"decoder.weight": tensor_metadata()}, **{place: attack})
    message = refusal(checkpoint(tmp_path, metadata))
    assert message == f"refusing a checkpoint whose .metadata names {os.name}.system: it could run code"
    assert not target.exists()


@pytest.mark.parametrize("function", [eval, exec, getattr, __import__, open])
def test_builtins_are_refused(tmp_path: Path, function: Any):
    message = refusal(checkpoint(tmp_path, RunsOnLoad(function, "1")))
    assert message.startswith("refusing a checkpoint whose .metadata names ")


@pytest.mark.parametrize("name", ["torch\nload", "torch.serialization\nload", "torch.storage\n_load_from_bytes"])
def test_torchs_own_loaders_are_refused(tmp_path: Path, name: str):
    (tmp_path / ".metadata").write_bytes(f"c{name}\n.".encode())
    assert refusal(tmp_path).startswith(f"refusing a checkpoint whose .metadata names {name.replace(chr(10), '.')}")


def test_pickled_objects_beside_the_tensors_are_refused(tmp_path: Path):
    metadata = Metadata({"decoder.weight": tensor_metadata(), "rng_state": BytesStorageMetadata()})
    assert refusal(checkpoint(tmp_path, metadata)) == (
        f"the checkpoint {tmp_path} holds pickled objects (rng_state), which are not read: only tensors are"
    )


COMMON = "common_state/shard_0_1"  # what megatron-core 0.19 calls the content of common.pt


def with_common_state(path: Path, place: str, state: object, file: str = "__0_0.distcp", **info: Any) -> Path:
    """A checkpoint with a common state where 0.16 (common.pt) or 0.19 (an entry behind others) puts it."""
    if place == "common.pt":
        torch.save(state, path / "common.pt")
        return checkpoint(path, Metadata({"decoder.weight": tensor_metadata()}))
    content = io.BytesIO()
    torch.save([state], content)
    (path / "__0_0.distcp").write_bytes(b"tensors" + content.getvalue() + b"more tensors")
    place_in_file = _StorageInfo(file, len(b"tensors"), len(content.getvalue()), **info)
    entries = {"decoder.weight": tensor_metadata(), COMMON: BytesStorageMetadata()}
    return checkpoint(path, Metadata(entries, storage_data={MetadataIndex(COMMON): place_in_file}))


@pytest.mark.parametrize("place", ["common.pt", "entry"])
def test_the_common_state_is_read_wherever_a_release_puts_it(tmp_path: Path, place: str):
    state = {"optimizer": {"param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}], "step": torch.tensor(3.0)}}
    directory = with_common_state(tmp_path, place, state)
    refuse_unsafe(directory)
    assert read_common_state(directory, "name another") == state


@pytest.mark.parametrize("place", ["common.pt", "entry"])
def test_code_in_the_common_state_is_refused_without_running(tmp_path: Path, place: str):
    target = tmp_path / "ran"
    directory = with_common_state(tmp_path, place, {"optimizer": RunsOnLoad(os.system, f"touch {target}")})
    with pytest.raises(UserError) as error:
        read_common_state(directory, "name another")
    assert str(error.value).startswith(f"the common state of {directory} is damaged or could run code (")
    assert "weights_only" not in str(error.value)  # torch advises to load without it
    assert str(error.value).endswith("; name another") and not target.exists()


def test_a_common_state_is_one_of_this_folder(tmp_path: Path):
    directory = with_common_state(tmp_path, "entry", {}, file="../elsewhere.distcp")
    with pytest.raises(UserError) as error:
        read_common_state(directory, "name another")
    assert str(error.value) == f"the .metadata file of {directory} is damaged; name another"
    (directory / "__0_0.distcp").unlink()
    with_common_state(tmp_path, "entry", {}, file="missing.distcp")
    with pytest.raises(UserError) as error:
        read_common_state(directory, "name another")
    assert str(error.value) == (
        f"the checkpoint {directory} cannot be read (missing.distcp: No such file or directory); name another"
    )


def test_a_checkpoint_without_a_common_state(tmp_path: Path):
    directory = checkpoint(tmp_path, Metadata({"decoder.weight": tensor_metadata()}))
    with pytest.raises(UserError) as error:
        read_common_state(directory, "name another")
    assert str(error.value) == f"{directory} has neither common.pt nor {COMMON}; name another"


def test_a_folder_without_metadata_is_not_a_checkpoint(tmp_path: Path):
    assert refusal(tmp_path) == f"{tmp_path} is not a checkpoint: it has no .metadata file"


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle", pickle.dumps({"a": 1})])
def test_a_damaged_metadata_file_is_an_error_of_one_sentence(tmp_path: Path, content: bytes):
    (tmp_path / ".metadata").write_bytes(content)
    assert refusal(tmp_path) == (
        f"the .metadata file of {tmp_path} is damaged; name an earlier checkpoint in {tmp_path.parent}/latest"
    )
