"""Offline conversion of checkpoints between Hugging Face and Megatron folders: one process, no model, no GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from chord_megatron.checkpoints.megatron_args import architecture_from_args, read_megatron_args, refuse_other_args
from chord_megatron.checkpoints.metadata import find_checkpoint
from chord_megatron.checkpoints.reader import MegatronReader
from chord_megatron.checkpoints.verification import Check, LogProbComparison, check_hf, check_log_probs, check_megatron
from chord_megatron.checkpoints.writer import Piece, plan_pieces, write_checkpoint
from chord_megatron.system.atomic import new_directory
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.families.common import EMBEDDING, HF_EMBEDDING
from chord_megatron.weights.hf_config import make_config, read_architecture
from chord_megatron.weights.mapping import find_mapping, hf_shapes, padded_vocab_size, parameter_names
from chord_megatron.weights.model_files import copy_model_files, set_config_dtype
from chord_megatron.weights.names import list_names
from chord_megatron.weights.safetensors_io import SafetensorsReader, check_complete
from chord_megatron.weights.safetensors_writer import MAX_SHARD_BYTES, SafetensorsWriter
from chord_megatron.weights.schema import TensorLayout, TensorSpec
from chord_megatron.weights.shards import export_parameter, import_parameter


@dataclass(frozen=True)
class Progress:
    """What a conversion reports: once the bytes in all, then those of each tensor that is done."""

    start: Callable[[str, int], None] = lambda description, nbytes: None
    advance: Callable[[int], None] = lambda nbytes: None


NO_PROGRESS = Progress()


@dataclass(frozen=True)
class Conversion:
    """What was written, and how it was checked."""

    nbytes: int  # of tensors
    seconds: float  # without the checks
    left_out: tuple[str, ...] = ()  # of the files beside the weights: a sentence each
    checks: tuple[str, ...] = ()  # a sentence each


def hf_to_megatron(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    compare_log_probs: LogProbComparison | None = None,
    progress: Progress = NO_PROGRESS,
) -> Conversion:
    """Write a Megatron checkpoint that loads under any layout, with the configuration and tokenizer of `source`.

    dtype: what floating-point weights become (routers' biases stay); None: as they are. compare_log_probs: to verify
    with, beside the bits. UserError: anything wrong with `source` or not enough space; `target` then does not exist.
    """
    arch = read_architecture(source)
    with SafetensorsReader(source) as reader:
        check_complete(reader, arch)
        pieces = plan_pieces(_megatron_specs(reader, arch, dtype), arch)
        nbytes = sum(piece.nbytes for piece in pieces)
        with new_directory(target, nbytes) as partial:
            start = time.monotonic()
            progress.start("converting", nbytes)
            write_checkpoint(partial, pieces, arch, lambda piece: _import_piece(piece, arch, reader, progress))
            seconds = time.monotonic() - start
            written_as = next(piece.dtype for piece in pieces if piece.name == EMBEDDING.megatron)
            conversion = Conversion(nbytes, seconds, _finish_folder([source], partial, arch, written_as))
            if verify:
                progress.start("verifying", nbytes)
                check = check_megatron(MegatronReader(partial, arch), reader, arch, progress.advance)
                of_models = check_log_probs(partial, source, arch, compare_log_probs)
                conversion = replace(conversion, checks=(_describe(check, source, target), *of_models))
    return conversion


def megatron_to_hf(
    source: Path,
    target: Path,
    *,
    hf_config: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: bool = False,
    compare_log_probs: LogProbComparison | None = None,
    progress: Progress = NO_PROGRESS,
) -> Conversion:
    """Write a folder that loads with `AutoModelForCausalLM.from_pretrained`.

    hf_config: the folder with config.json and tokenizer; None: `source` has them, or is of Megatron-LM, whose
    arguments a config.json is made from. The others and errors as for hf_to_megatron.
    """
    folders = _config_folders(source, hf_config)
    arch = _read_architecture(folders, source)
    reader = MegatronReader(source, arch)
    specs = _hf_specs(reader, arch, dtype)
    nbytes = sum(spec.nbytes for spec in specs.values())
    with new_directory(target, nbytes) as partial:
        start = time.monotonic()
        progress.start("converting", nbytes)
        _write_hf(reader, arch, specs, partial, max_shard_bytes, progress)
        seconds = time.monotonic() - start
        conversion = Conversion(nbytes, seconds, _finish_folder(folders, partial, arch, specs[HF_EMBEDDING].dtype))
        if verify:
            progress.start("verifying", nbytes)
            with SafetensorsReader(partial) as written:
                check = check_hf(written, reader, arch, progress.advance)
            of_models = check_log_probs(reader.directory, partial, arch, compare_log_probs)
            conversion = replace(conversion, checks=(_describe(check, source, target), *of_models))
    return conversion


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in `dtype`; UserError where a number is too large for it."""
    result = tensor.to(dtype)
    if dtype is torch.float16 and dtype != tensor.dtype and not torch.equal(result.isfinite(), tensor.isfinite()):
        raise UserError(f"{name} holds numbers that float16 cannot; use --dtype bfloat16 or float32")
    return result


def _megatron_specs(
    reader: SafetensorsReader, arch: ModelArchitecture, dtype: torch.dtype | None
) -> Mapping[str, TensorSpec]:
    """What each full Megatron parameter will be. Raises UserError where its parts have different dtypes."""
    specs: dict[str, TensorSpec] = {}
    for name in parameter_names(arch):
        parameter = find_mapping(name, arch)
        shapes = hf_shapes(parameter, arch)
        dtypes = {_target_dtype(name, reader.spec(hf_name).dtype, arch, dtype) for hf_name in shapes}
        if len(dtypes) > 1:
            raise UserError(
                f"{list_names(shapes)} have different dtypes, and are one tensor in Megatron; choose one with --dtype"
            )
        rows, *rest = (sum(shape[0] for shape in shapes.values()), *next(iter(shapes.values()))[1:])
        if parameter.mapping.layout is TensorLayout.VOCAB:
            rows = padded_vocab_size(rows, tp_size=1)  # other layouts cut or pad it on loading
        specs[name] = TensorSpec(dtypes.pop(), (rows, *rest))
    return specs


def _target_dtype(name: str, found: torch.dtype, arch: ModelArchitecture, asked: torch.dtype | None) -> torch.dtype:
    return found if asked is None or find_mapping(name, arch).mapping.is_float32 else asked


def _import_piece(piece: Piece, arch: ModelArchitecture, reader: SafetensorsReader, progress: Progress) -> Tensor:
    parameter = find_mapping(piece.name, arch)
    if parameter.mapping.layout is TensorLayout.QKV:
        tensor = import_parameter(
            piece.name, arch, reader.get_slice, tp_rank=0, tp_size=1, padded_vocab_size=arch.vocab_size
        )
    else:
        tensor = _read_rows(piece, hf_shapes(parameter, arch), reader)
    progress.advance(piece.nbytes)
    return cast(tensor, piece.dtype, piece.name)


def _read_rows(piece: Piece, shapes: Mapping[str, tuple[int, ...]], reader: SafetensorsReader) -> Tensor:
    """Rows of Hugging Face tensors that follow one another, not copied; behind the last there are zeros."""
    start, num_rows = piece.first_row, piece.shape[0]
    for hf_name, shape in shapes.items():
        if start < shape[0]:
            rows = reader.get_slice(hf_name)[start : min(start + num_rows, shape[0])]
            missing = num_rows - rows.shape[0]
            return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
        start -= shape[0]
    return torch.zeros(piece.shape, dtype=piece.dtype)


def _hf_specs(reader: MegatronReader, arch: ModelArchitecture, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    """What each Hugging Face tensor will be, in their order."""
    return {
        hf_name: TensorSpec(_target_dtype(name, reader.spec(name).dtype, arch, dtype), shape)
        for name in parameter_names(arch)
        for hf_name, shape in hf_shapes(find_mapping(name, arch), arch).items()
    }


def _write_hf(
    reader: MegatronReader,
    arch: ModelArchitecture,
    specs: Mapping[str, TensorSpec],
    directory: Path,
    max_shard_bytes: int,
    progress: Progress,
) -> None:
    with SafetensorsWriter(directory, specs, max_shard_bytes) as writer:
        for name in parameter_names(arch):
            for hf_name, first_row, rows in _export(name, arch, reader):
                writer.write_rows(hf_name, cast(rows, specs[hf_name].dtype, hf_name), first_row)
                progress.advance(rows.shape[0] * specs[hf_name].nbytes // specs[hf_name].shape[0])
        writer.publish(directory)


def _export(name: str, arch: ModelArchitecture, reader: MegatronReader) -> Iterator[tuple[str, int, Tensor]]:
    """Rows of a parameter's Hugging Face tensors and the number of the first; without vocabulary padding."""
    parameter = find_mapping(name, arch)
    if parameter.mapping.layout is TensorLayout.QKV:
        yield from ((hf_name, 0, tensor) for hf_name, tensor in export_parameter(name, arch, [reader.read(name)]))
        return
    for first, rows in reader.read_rows(name):
        start = 0  # the Hugging Face tensors follow one another
        for hf_name, shape in hf_shapes(parameter, arch).items():
            low, high = max(first, start), min(first + rows.shape[0], start + shape[0])
            if low < high:
                yield hf_name, low - start, rows[low - first : high - first]
            start += shape[0]


def _config_folders(source: Path, hf_config: Path | None) -> list[Path]:
    """Where config.json and the tokenizer are, the first before the others."""
    folders = [*([hf_config] if hf_config else []), find_checkpoint(source), source]
    found = [folder for folder in dict.fromkeys(folders) if (folder / "config.json").is_file()]
    if hf_config is not None and hf_config not in found:
        raise UserError(f"--hf-config {hf_config} has no config.json; name the Hugging Face folder of the model")
    return found


def _read_architecture(folders: list[Path], source: Path) -> ModelArchitecture:
    """What config.json says, and must not contradict Megatron-LM's arguments; without it, what these say."""
    args = read_megatron_args(find_checkpoint(source))
    if not folders:
        if args is None:
            raise UserError(f"{source} has no config.json; name the Hugging Face folder of the model with --hf-config")
        return architecture_from_args(args)
    arch = read_architecture(folders[0])
    if args is not None:
        refuse_other_args(args, arch)
    return arch


def _finish_folder(sources: list[Path], target: Path, arch: ModelArchitecture, dtype: torch.dtype) -> tuple[str, ...]:
    """All but the weights; returns what was left out."""
    left_out = copy_model_files(sources, target, arch)
    if not sources:
        (target / "config.json").write_text(json.dumps(make_config(arch), indent=2) + "\n", encoding="utf-8")
    set_config_dtype(target, dtype)
    return tuple(left_out)


def _describe(check: Check, source: Path, target: Path) -> str:
    return (
        f"verified: {check.num_tensors} tensors, {check.nbytes / 1e9:.2f} GB, read back from disk bitwise equal; "
        f"crc32 {check.source_crc32:08x} of {source}, {check.target_crc32:08x} of {target}"
    )
