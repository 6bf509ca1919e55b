"""Reading the safetensors files of a Hugging Face model folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from chord_megatron.system.errors import UserError
from chord_megatron.system.files import is_lfs_pointer, read_json_object
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.families.common import HF_HEAD
from chord_megatron.weights.foreign import describe_folder, remedy_for_names
from chord_megatron.weights.mapping import hf_tensors, is_ignorable
from chord_megatron.weights.names import list_names
from chord_megatron.weights.schema import TensorSpec
from chord_megatron.weights.shards import TensorSlice

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# As the headers of safetensors files spell them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SafetensorsReader:
    """The tensors of a model folder, one file or sharded, mapped into memory. A context manager.

    UserError names a missing or damaged file, and a missing tensor.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        with ExitStack() as stack:
            if (directory / SINGLE_FILE).is_file():
                self._open(SINGLE_FILE, stack)
            else:
                weight_map = self._read_index()
                for file in dict.fromkeys(weight_map.values()):
                    self._open(file, stack)
                self._check_index(weight_map)
            self._stack = stack.pop_all()

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.clear()
        self._stack.close()

    def names(self) -> set[str]:
        """Names of all tensors in the folder."""
        return set(self._file_of)

    def get_slice(self, name: str) -> TensorSlice:
        """The tensor on disk; indexing it reads only what is asked for."""
        return self._slice(name)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, which is not read."""
        found = self._slice(name)
        if found.get_dtype() not in DTYPES:
            raise UserError(
                f"{name} in {self._directory} is stored as {found.get_dtype()}, which is not supported; "
                "use the unquantized checkpoint"
            )
        return TensorSpec(DTYPES[found.get_dtype()], tuple(found.get_shape()))

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise UserError(f"{self._directory} has no tensor {name}; download the model again.")
        return self._files[self._file_of[name]].get_slice(name)

    def _read_index(self) -> dict[str, str]:
        index = self._directory / INDEX_FILE
        if not index.is_file():
            kind = describe_folder(self._directory)
            raise UserError(
                f"{self._directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; "
                f"{f'it {kind}' if kind else 'save the model with save_pretrained'}."
            )
        weight_map = read_json_object(index, "download it again").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{index} is not a safetensors index; download it again.")
        there = {path.name for path in self._directory.iterdir() if path.is_file()}
        for file in dict.fromkeys(weight_map.values()):
            if file in (".", "..") or Path(file).name != file:
                raise UserError(f"{index} names the file {file!r}, which is not beside it; download the model again.")
            if file not in there:
                raise UserError(f"{self._directory} lacks {file}; download the model again.")
        return weight_map

    def _check_index(self, weight_map: dict[str, str]) -> None:
        """The files hold what the index says; a tensor that it does not name is one that nobody would read."""
        if absent := [name for name, file in weight_map.items() if self._file_of.get(name) != file]:
            raise UserError(
                f"the files in {self._directory} lack {list_names(absent)}, which the index promises; "
                "download the model again."
            )
        if unlisted := set(self._file_of) - set(weight_map):
            raise UserError(
                f"{self._directory / INDEX_FILE} lacks {list_names(unlisted)}, which the files hold; "
                "download the model again."
            )

    def _open(self, file: str, stack: ExitStack) -> None:
        path = self._directory / file
        try:
            handle: Any = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(_damage(path, error)) from error
        for name in handle.keys():  # noqa: SIM118, not a mapping
            if name in self._file_of:
                raise UserError(
                    f"{path} holds {name}, and so does {self._file_of[name]}; save the model with save_pretrained."
                )
            self._file_of[name] = file
        self._files[file] = handle


def _damage(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        if is_lfs_pointer(file.read(100)):
            return f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there."
    return f"{path} is not a complete safetensors file ({error}); download it again."


def check_complete(reader: SafetensorsReader, arch: ModelArchitecture) -> None:
    """Every tensor of the model is there, of its shape, and no other; UserError lists the names."""
    shapes = {name: spec.shape for name, spec in hf_tensors(arch, torch.float32).items()}
    expected, found = set(shapes), reader.names()
    missing, unexpected = expected - found, {name for name in found - expected if not is_ignorable(name, arch)}
    remedy = remedy_for_names(unexpected, expected)
    if missing == {HF_HEAD} and not remedy:
        raise UserError(
            f"the checkpoint lacks {HF_HEAD}; set tie_word_embeddings: true in config.json if the embedding is the "
            "head, or save the model with its head"
        )
    if missing:
        raise UserError(
            f"the checkpoint lacks tensors of a {arch.family} model: {list_names(missing)}; "
            f"{remedy or 'download it again'}."
        )
    if unexpected:
        raise UserError(
            f"the checkpoint has tensors that a {arch.family} model does not: {list_names(unexpected)}; "
            f"{remedy or 'use the config.json that belongs to these weights'}."
        )
    specs = {name: reader.spec(name) for name in shapes}
    refuse_foreign_dtypes({name: spec.dtype for name, spec in specs.items()})
    if wrong := [
        f"{name} {list(spec.shape)} instead of {list(shapes[name])}"
        for name, spec in specs.items()
        if spec.shape != shapes[name]
    ]:
        raise UserError(f"wrong shapes: {', '.join(wrong)}; use the config.json that belongs to these weights")


def refuse_foreign_dtypes(dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise UserError where tensors, by name, are of no type that weights have."""
    if foreign := {name: dtype for name, dtype in dtypes.items() if dtype not in WEIGHT_DTYPES}:
        kinds = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in foreign.values()}))
        raise UserError(
            f"{list_names(foreign)} hold {kinds} numbers, which are no weights; use the unquantized checkpoint"
        )
