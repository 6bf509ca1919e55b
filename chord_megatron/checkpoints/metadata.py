"""Finding torch_dist checkpoints, and reading their `.metadata` without running code that came with it."""

from __future__ import annotations

import os
import pathlib
import pickle
import re
from pathlib import Path
from typing import Any

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

from chord_megatron.checkpoints.bounded_pickle import BoundedUnpickler, Inert
from chord_megatron.system.errors import UserError
from chord_megatron.system.files import read_json_object
from chord_megatron.system.sentences import looked_for, shown

METADATA_FILE = ".metadata"
# Where megatron-core keeps what is no tensor, since 0.19 (checkpoints/common_state.py).
COMMON_STATE = "common_state/shard_0_1"
_TRACKER = "latest_checkpointed_iteration.txt"
_TORCH_DIST_REMEDY = "convert it with Megatron-LM's --ckpt-convert-format torch_dist"


def find_checkpoint(directory: Path) -> Path:
    """The folder with the .metadata file: `directory`, or Megatron-LM's latest iteration below it. UserError."""
    tracker = directory / _TRACKER
    if not directory.is_dir():
        raise UserError(
            f"the checkpoint folder {directory} is not a directory{looked_for(directory)}{_instead_of(directory)}"
        )
    if not (directory / METADATA_FILE).is_file() and tracker.is_file():
        latest = tracker.read_bytes().decode("ascii", errors="replace").strip()
        if not re.fullmatch("release|[0-9]{1,15}", latest):
            raise UserError(
                f"{tracker} holds {shown(latest)}, neither a number nor `release`; name an iteration folder"
            )
        below = directory / ("release" if latest == "release" else f"iter_{int(latest):07d}")
        if not below.is_dir():
            raise UserError(f"{directory} lacks {below.name}, which {_TRACKER} names; name an iteration folder")
        directory = below
    if (directory / METADATA_FILE).is_file():
        _refuse_other_backend(directory)
        return directory
    if any(directory.glob("mp_rank_*")):
        raise UserError(f'{directory} is in Megatron-LM\'s old "torch" format; {_TORCH_DIST_REMEDY}')
    _refuse_other_backend(directory)
    raise UserError(
        f"{directory} is not a Megatron checkpoint: it has neither .metadata nor {_TRACKER}{_instead_of(directory)}"
    )


def _instead_of(directory: Path) -> str:
    """The end of a sentence that refuses a folder: the newest checkpoint of a run nearby, if there is one."""
    for folder in (directory / "checkpoints", directory, directory.parent, directory.parent / "checkpoints"):
        steps = [step for step in folder.glob("step_*") if (step / METADATA_FILE).is_file() and step != directory]
        if steps:
            newest = max(steps, key=lambda step: (len(step.name), step.name))  # by number
            return f"; did you mean {newest}?"
    return ""


def _refuse_other_backend(directory: Path) -> None:
    path = directory / "metadata.json"
    if not os.path.lexists(path):
        return
    backend = read_json_object(path, "copy the checkpoint again").get("sharded_backend")
    if backend is None:
        raise UserError(f"{path} is damaged: it names no sharded_backend; copy the checkpoint again")
    if backend != "torch_dist":
        raise UserError(f"{directory} is in the format {backend!r}; {_TORCH_DIST_REMEDY}")


def read_metadata(directory: Path, remedy: str) -> Metadata:
    """What a checkpoint holds, and where. UserError where it is damaged (with `remedy`) or could run code."""
    try:
        content = (directory / METADATA_FILE).read_bytes()
        metadata = _MetadataUnpickler(content).load()
        is_sound = isinstance(metadata, Metadata) and _is_sound(metadata, len(content))
    except FileNotFoundError:
        raise UserError(f"{directory} is not a checkpoint: it has no .metadata file") from None
    except UserError:
        raise
    except Exception:  # damaged pickles fail in every way there is
        is_sound = False
    if not is_sound:
        raise UserError(f"the .metadata file of {directory} is damaged; {remedy}")
    return metadata


def _is_sound(metadata: Metadata, length: int) -> bool:
    """Whether everything that is read of it has its type: a damaged pickle may load all the same.

    length: of the pickle, in which one list can be many. Raises AttributeError where an object lost what it had.
    """
    entries, storage = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(entries, dict) or not isinstance(storage, dict | None):
        return False
    if sum(len(entry.chunks) for entry in entries.values() if isinstance(entry, TensorStorageMetadata)) > length:
        return False
    return all(isinstance(key, str) and _is_sound_entry(entry) for key, entry in entries.items()) and all(
        isinstance(info.relative_path, str) and type(info.offset) is type(info.length) is int and info.offset >= 0
        for info in (storage or {}).values()
        if isinstance(info, _StorageInfo)
    )


def _is_sound_entry(entry: object) -> bool:
    if not isinstance(entry, TensorStorageMetadata):
        return isinstance(entry, BytesStorageMetadata)
    if not isinstance(entry.properties, TensorProperties) or not isinstance(entry.chunks, list):
        return False
    return (
        isinstance(entry.properties.dtype, torch.dtype)
        and _is_size(entry.size)
        and all(isinstance(chunk, ChunkStorageMetadata) for chunk in entry.chunks)
        and all(_is_within(chunk, entry.size) for chunk in entry.chunks)
    )


def _is_within(chunk: ChunkStorageMetadata, size: torch.Size) -> bool:
    return (
        _is_size(chunk.offsets)
        and _is_size(chunk.sizes)
        and len(chunk.offsets) == len(chunk.sizes) == len(size)
        and all(offset + extent <= whole for offset, extent, whole in zip(chunk.offsets, chunk.sizes, size))
    )


def _is_size(size: object) -> bool:
    return isinstance(size, torch.Size) and all(type(number) is int and 0 <= number < 2**48 for number in size)


def refuse_unsafe(directory: Path) -> None:
    """Raise UserError unless reading all of the checkpoint cannot run code.

    torch reads `.metadata` with plain pickle, and pickles any object (not tensor) that it lists: the first must
    pass an allow-list of names, the second must not be there, but for the common state, which torch never reads
    (checkpoints/common_state.py does, without running anything).
    """
    metadata = read_metadata(directory, f"name an earlier checkpoint in {directory.parent}/latest")
    objects = {key for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)}
    pickled = sorted(objects - {COMMON_STATE})
    if pickled:
        raise UserError(
            f"the checkpoint {directory} holds pickled objects ({', '.join(pickled[:5])}), "
            "which are not read: only tensors are"
        )


_ALLOWED = {
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.Size",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
}
_REPLACED: dict[str, Any] = {
    "pathlib._local.PosixPath": pathlib.PosixPath,  # as Python 3.13 calls it
    # What says nothing about the tensors, but how the checkpoint was written.
    **{
        f"torch.distributed.checkpoint.planner.{name}": Inert
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    },
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata": Inert,
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan": Inert,
}


class _MetadataUnpickler(BoundedUnpickler):
    """Only the classes of which torch.distributed.checkpoint and Megatron-Core build their metadata."""

    def check_tuple(self, value: tuple[Any, ...]) -> None:
        super().check_tuple(value)
        # torch, which reads the file after this, may hash arguments and keys, and an index all that is in it.
        if any(isinstance(element, Inert) for element in value):
            raise pickle.UnpicklingError("an object as an argument")

    def check_key(self, key: Any) -> None:
        if isinstance(key, Inert):
            raise pickle.UnpicklingError("an object as a key")

    def check_built(self, value: Any) -> None:
        parts = vars(value).values() if isinstance(value, MetadataIndex) else ()
        if not all(isinstance(part, str | int | torch.Size | None) for part in parts):
            raise pickle.UnpicklingError("an index of objects")

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in _REPLACED:
            return _REPLACED[full_name]
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if full_name not in _ALLOWED and not is_dtype:
            raise UserError(f"refusing a checkpoint whose .metadata names {full_name}: it could run code")
        return super().find_class(module, name)


def cause_of(error: BaseException) -> str:
    """What torch says of a damaged file, in a few words: the last line, behind the tracebacks of all ranks.

    Not its advice to load without `weights_only`, which would run what the file says.
    """
    text = str(error).strip()
    if "weights_only" in text:
        return "it holds something else than tensors"
    return (text or type(error).__name__).splitlines()[-1][:200]
