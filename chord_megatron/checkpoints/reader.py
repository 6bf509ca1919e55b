"""Reading a Megatron torch_dist checkpoint without a model or a process group.

Megatron-Core writes a model in several forms, told apart by their keys:
    decoder.layers.3.mlp.linear_fc1.weight            a key for each layer (non_homogeneous_layers)
    decoder.layers.mlp.linear_fc1.weight              all layers, [num_layers, ...]
    ...mlp.experts.experts.linear_fc1.weight          all experts of a layer, [num_experts, ...] behind the layers
    ...mlp.experts.experts.5.linear_fc1.weight_w, _v  one expert's gate and up (singleton_local_shards)
Megatron-LM's local layers have other names for some norms (`_patterns`).
A tensor is stored in chunks, each a `torch.save` of its own within a .distcp file.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from chord_megatron.checkpoints.bounded_pickle import check_tensors
from chord_megatron.checkpoints.metadata import METADATA_FILE, cause_of, find_checkpoint, read_metadata
from chord_megatron.system.errors import UserError
from chord_megatron.system.files import FilePart
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.mapping import MappedParameter, hf_shapes, mapped_parameters
from chord_megatron.weights.names import list_names
from chord_megatron.weights.safetensors_io import SafetensorsReader, check_complete, refuse_foreign_dtypes
from chord_megatron.weights.schema import TensorLayout, TensorSpec

# What training saves beside the model; none of it is read.
_NOT_MODEL = re.compile(
    r"(chained_\d+\.)?optimizer\.|(common_state|rng_state|rerun_state_machine_state|opt_param_scheduler)\b|.*\b_extra_state"
)


@dataclass(frozen=True)
class CheckpointForm:
    """How the keys of a checkpoint are made, as `sharded_state_dict(metadata=...)` is told."""

    non_homogeneous_layers: bool
    singleton_local_shards: bool


@dataclass(frozen=True)
class _Source:
    """Where a parameter is: a part of one stored tensor, or of two that are joined."""

    keys: tuple[str, ...]
    leading: tuple[int, ...]  # layer and expert, where the stored tensor has those axes
    extents: tuple[int, ...]  # sizes of these axes
    form: CheckpointForm
    usual_keys: tuple[
        str, ...
    ] = ()  # what they are called elsewhere, where these are those of Megatron-LM's local layers


class MegatronReader:
    """The full parameters of a Megatron checkpoint under their local-spec names.

    `directory`: one of this package, of Megatron-LM (also the folder above its iterations), or a converted one.
    UserError: another format, a damaged file, or tensors that are not those of `arch`, all of them named.
    """

    def __init__(self, directory: Path, arch: ModelArchitecture) -> None:
        self.directory = find_checkpoint(directory)
        metadata = read_metadata(self.directory, "copy the checkpoint again")
        self._tensors = _model_tensors(metadata, self.directory)
        self._storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data or {}
        self._sources = _match(self._tensors, arch, self.directory)
        self._chunks: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        keys = (key for source in self._sources.values() for key in source.keys)
        refuse_foreign_dtypes({key: self._tensors[key].properties.dtype for key in keys})
        self._check_files()

    @property
    def form(self) -> CheckpointForm:
        """The form of the whole checkpoint."""
        forms = [source.form for source in self._sources.values()]
        return CheckpointForm(
            all(form.non_homogeneous_layers for form in forms), any(form.singleton_local_shards for form in forms)
        )

    @property
    def renamed(self) -> dict[str, str]:
        """Usual key -> key here, where Megatron-LM's local layers have another."""
        return {usual: key for s in self._sources.values() for usual, key in zip(s.usual_keys, s.keys)}

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a full parameter, which is not read."""
        source = self._sources[name]
        entries = [self._tensors[key] for key in source.keys]
        rows, *rest = (size for size in entries[0].size[len(source.leading) :])
        return TensorSpec(entries[0].properties.dtype, (rows * len(entries), *rest))

    def read(self, name: str) -> Tensor:
        """A full parameter, with the vocabulary padding that was saved."""
        source = self._sources[name]
        parts = [self._assemble(key, source.leading) for key in source.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_rows(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The same in runs of rows, with the number of their first: not copied where chunks hold whole rows."""
        source = self._sources[name]
        axes, first = len(source.leading), 0
        for key in source.keys:
            entry = self._tensors[key]
            chunks = self._chunks_at(key, source.leading)
            if all(chunk.sizes[axes + 1 :] == entry.size[axes + 1 :] for chunk in chunks):
                for chunk in chunks:
                    yield first + chunk.offsets[axes], self._load_at(key, chunk, source.leading)
            else:
                yield first, self._assemble(key, source.leading)
            first += entry.size[axes]

    def _assemble(self, key: str, leading: tuple[int, ...]) -> Tensor:
        """The part of a stored tensor at these leading indices, out of its chunks."""
        entry, axes = self._tensors[key], len(leading)
        shape = entry.size[axes:]
        full = None
        for chunk in self._chunks_at(key, leading):
            part = self._load_at(key, chunk, leading)
            if part.shape == shape:
                return part
            full = torch.empty(shape, dtype=part.dtype) if full is None else full
            places = zip(chunk.offsets[axes:], chunk.sizes[axes:])
            full[tuple(slice(offset, offset + size) for offset, size in places)] = part
        assert full is not None, f"no chunk of {key} at {leading}"  # _check_files counted them
        return full

    def _chunks_at(self, key: str, leading: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        axes = len(leading)
        if (key, axes) not in self._chunks:
            self._chunks[key, axes] = _by_leading(self._tensors[key].chunks, axes)
        return self._chunks[key, axes][leading]

    def _load_at(self, key: str, chunk: ChunkStorageMetadata, leading: tuple[int, ...]) -> Tensor:
        """What a chunk holds at these leading indices."""
        part = self._load(key, chunk)
        return part[tuple(index - offset for index, offset in zip(leading, chunk.offsets))]

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        path = self.directory / info.relative_path
        try:
            tensor = _map_tensor(path, info)
        except Exception as error:  # torch and zip report damage as RuntimeError, ValueError, EOFError, ...
            raise UserError(f"{path} is damaged at {key} ({cause_of(error)}); copy the checkpoint again") from error
        dtype = self._tensors[key].properties.dtype
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes or tensor.dtype != dtype:
            raise UserError(f"{path} does not hold {key} as .metadata describes it; copy the checkpoint again")
        return tensor.detach()

    def _check_files(self) -> None:
        """Every chunk has a part of a file of this folder to itself, as long as it, and a tensor's chunks fill it."""
        ends: dict[str, int] = defaultdict(int)
        sums: dict[str, int] = defaultdict(int)
        for key, entry in self._tensors.items():
            for chunk in entry.chunks:
                info = self._storage.get(MetadataIndex(key, chunk.offsets))
                nbytes = chunk.sizes.numel() * entry.properties.dtype.itemsize
                if info is None or Path(info.relative_path).name != info.relative_path or info.length < nbytes:
                    raise UserError(f"the .metadata file of {self.directory} is damaged; copy the checkpoint again")
                if info.transform_descriptors:
                    raise UserError(
                        f"{self.directory} stores {key} transformed ({', '.join(info.transform_descriptors)}), "
                        "which is not supported; save it without extensions"
                    )
                ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
                sums[info.relative_path] += info.length
            if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
                raise UserError(f"{self.directory} holds only parts of {key}; copy the checkpoint again")
        for file, end in ends.items():
            path = self.directory / file
            if not path.is_file():
                raise UserError(f"{self.directory} lacks {file}; copy the checkpoint again")
            if (size := path.stat().st_size) < end:
                raise UserError(f"{path} is truncated ({size} of {end} bytes); copy the checkpoint again")
            if sums[file] > size:  # one place for many tensors, which would become larger than their files
                raise UserError(f"the .metadata file of {self.directory} is damaged; copy the checkpoint again")


def check_weights(model_dir: Path, arch: ModelArchitecture) -> None:
    """Raise UserError unless a model folder holds the tensors of `arch`, by its headers.

    For before such a model is built, which takes the memory and time of what config.json says.
    """
    if (model_dir / METADATA_FILE).is_file():
        MegatronReader(model_dir, arch)
    else:
        with SafetensorsReader(model_dir) as reader:
            check_complete(reader, arch)


def _map_tensor(path: Path, info: _StorageInfo) -> Tensor:
    """A tensor that `torch.save` wrote into a part of a file: mapped, or read where that cannot be done."""
    with path.open("rb") as file:
        view = io.BufferedReader(FilePart(file, info.offset, info.length))
        check_tensors(view)
        tensor = torch.load(view, map_location="meta", weights_only=True)
        place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)  # absent in torch before 2.8
        if place is None or (info.offset + place) % tensor.itemsize:
            view.seek(0)
            return torch.load(view, map_location="cpu", weights_only=True)
    start = info.offset + place
    nbytes = start + tensor.untyped_storage().nbytes()
    storage = cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(path), False, nbytes))
    offset = start // tensor.itemsize + tensor.storage_offset()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, offset, tensor.shape, tensor.stride())


def _model_tensors(metadata: Metadata, directory: Path) -> dict[str, TensorStorageMetadata]:
    """The stored tensors of the model; objects in its place are pickles, which are not read."""
    entries = {key: entry for key, entry in metadata.state_dict_metadata.items() if not _NOT_MODEL.match(key)}
    if pickled := [key for key, entry in entries.items() if not isinstance(entry, TensorStorageMetadata)]:
        raise UserError(
            f"the checkpoint {directory} holds pickled objects that are not part of a training state: "
            f"{list_names(pickled)}; save the model without them"
        )
    return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _match(tensors: dict[str, TensorStorageMetadata], arch: ModelArchitecture, directory: Path) -> dict[str, _Source]:
    """The source of every parameter; all that is missing, unknown or of a wrong shape in one UserError."""
    sources: dict[str, _Source] = {}
    missing, wrong = [], []
    for parameter in mapped_parameters(arch):
        if parameter.mapping.is_copy:
            continue
        source = next((s for s in _candidates(parameter, arch) if all(key in tensors for key in s.keys)), None)
        if source is None:
            missing.append(parameter.name(parameter.mapping.checkpoint_key))
            continue
        sources[parameter.local_name] = source
        expected = _stored_shape(parameter, source, arch)
        for key in source.keys:
            actual = list(tensors[key].size)
            if not _is_shape(actual, expected, parameter):
                wrong.append(f"{key} {actual} instead of {expected}")
    unknown = set(tensors) - {key for source in sources.values() for key in source.keys}
    problems = [f"missing {list_names(missing)}"] * bool(missing)
    problems += [f"unknown {list_names(unknown)}"] * bool(unknown)
    problems += [f"wrong shapes {', '.join(dict.fromkeys(wrong))}"] * bool(wrong)
    if problems:
        raise UserError(
            f"the checkpoint {directory} is not the {arch.family} model of this config.json: {'; '.join(problems)}; "
            "use the config.json that belongs to these weights"
        )
    return sources


def _patterns(parameter: MappedParameter) -> Iterator[str]:
    """The keys that a parameter can have, the usual one first.

    Megatron-LM's local layers map no norm of latent attention to its usual key, and those before experts to another
    (gpt_layer_specs.py, get_gpt_layer_local_spec).
    """
    mapping = parameter.mapping
    others = (mapping.megatron if parameter.expert is None else None, mapping.also_stored_as)
    yield from dict.fromkeys([mapping.checkpoint_key, *filter(None, others)])


def _candidates(parameter: MappedParameter, arch: ModelArchitecture) -> Iterator[_Source]:
    """Where a parameter can be."""
    usual, *others = _patterns(parameter)
    yield from _sources(parameter, usual, arch)
    for other in others:
        for source, elsewhere in zip(_sources(parameter, other, arch), _sources(parameter, usual, arch)):
            yield replace(source, usual_keys=elsewhere.keys)


def _sources(parameter: MappedParameter, pattern: str, arch: ModelArchitecture) -> Iterator[_Source]:
    """Where a parameter can be, by the form of the checkpoint."""
    axes: list[tuple[int, int]] = []
    if parameter.expert is not None:
        assert arch.moe is not None
        axes = [(parameter.expert, arch.moe.num_experts)]
        single = pattern.replace(".experts.experts.", ".experts.experts.{expert}.")
        yield _source(parameter, single, [], CheckpointForm(True, True))
    elif parameter.mapping.layout is TensorLayout.GATE_UP:
        yield _source(parameter, pattern, [], CheckpointForm(True, True))
    yield _source(parameter, pattern, axes, CheckpointForm(True, False))
    if parameter.layer is not None:
        axes = [(parameter.layer, arch.num_layers), *axes]
        yield _source(parameter, pattern.replace("{layer}.", ""), axes, CheckpointForm(False, False))


def _source(parameter: MappedParameter, pattern: str, axes: list[tuple[int, int]], form: CheckpointForm) -> _Source:
    key = parameter.name(pattern)
    is_split = form.singleton_local_shards and parameter.mapping.layout is TensorLayout.GATE_UP
    return _Source(
        keys=(f"{key}_w", f"{key}_v") if is_split else (key,),
        leading=tuple(index for index, _ in axes),
        extents=tuple(extent for _, extent in axes),
        form=form,
    )


def _stored_shape(parameter: MappedParameter, source: _Source, arch: ModelArchitecture) -> list[int]:
    """The shape of each stored tensor of a source, without vocabulary padding."""
    shapes = list(hf_shapes(parameter, arch).values())
    return [*source.extents, sum(shape[0] for shape in shapes) // len(source.keys), *shapes[0][1:]]


def _is_shape(actual: list[int], expected: list[int], parameter: MappedParameter) -> bool:
    if parameter.mapping.layout is TensorLayout.VOCAB and len(actual) == len(expected):
        return actual[0] >= expected[0] and actual[1:] == expected[1:]
    return actual == expected


def _by_leading(chunks: list[ChunkStorageMetadata], axes: int) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
    """The chunks that hold a part of each index of the first `axes` axes."""
    found = defaultdict(list)
    for chunk in chunks:
        if not chunk.sizes.numel():
            continue  # of no number, in as many places as it likes
        ranges = [range(offset, offset + size) for offset, size in zip(chunk.offsets[:axes], chunk.sizes[:axes])]
        for leading in product(*ranges):
            found[leading].append(chunk)
    return found
