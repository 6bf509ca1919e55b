"""What `--verify` checks: the folder that was written, read back from disk, against its source."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from chord_megatron.checkpoints.reader import MegatronReader
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.mapping import hf_tensors, parameter_names
from chord_megatron.weights.names import list_names
from chord_megatron.weights.safetensors_io import SafetensorsReader
from chord_megatron.weights.shards import export_parameter, import_parameter

MAX_LOG_PROB_DIFFERENCE = 1e-4
_MARGIN_BYTES = 2 * 10**9  # activations, libraries, and the file pages being read

# (name, tensor of the source in the dtype that was written, tensor that was written)
_Pairs = Iterator[tuple[str, Tensor, Tensor]]

# (Megatron folder, Hugging Face folder, architecture) -> largest difference; None where transformers' are not finite
LogProbComparison = Callable[[Path, Path, ModelArchitecture], float | None]


@dataclass(frozen=True)
class Check:
    """How much was compared, and zlib.crc32 over the bytes of all tensors in the order of the model."""

    num_tensors: int
    nbytes: int
    source_crc32: int
    target_crc32: int


def check_megatron(
    written: MegatronReader, source: SafetensorsReader, arch: ModelArchitecture, advance: Callable[[int], None]
) -> Check:
    """Turn a written Megatron checkpoint back into Hugging Face tensors and compare them with the source's bits.

    UserError lists tensors that differ.
    """

    def pairs() -> _Pairs:
        for name in parameter_names(arch):
            for hf_name, tensor in export_parameter(name, arch, [written.read(name)]):
                yield hf_name, source.get_slice(hf_name)[:].to(tensor.dtype), tensor

    return _compare(pairs(), advance)


def check_hf(
    written: SafetensorsReader, source: MegatronReader, arch: ModelArchitecture, advance: Callable[[int], None]
) -> Check:
    """Turn a written Hugging Face folder back into Megatron parameters, without padding, and compare likewise."""

    def pairs() -> _Pairs:
        for name in parameter_names(arch):
            tensor = import_parameter(
                name, arch, written.get_slice, tp_rank=0, tp_size=1, padded_vocab_size=arch.vocab_size
            )
            yield name, source.read(name)[: tensor.shape[0]].to(tensor.dtype), tensor

    return _compare(pairs(), advance)


def check_log_probs(
    megatron_dir: Path, hf_dir: Path, arch: ModelArchitecture, compare: LogProbComparison | None
) -> list[str]:
    """Compare the log-probs of both models on a few random tokens in float32, where one of them fits into memory.

    The sentences to report, none without `compare`. UserError where they differ by more than MAX_LOG_PROB_DIFFERENCE.
    """
    if compare is None:
        return []
    parameters = hf_tensors(arch, torch.float32).values()
    # One model after the other; loading takes the largest tensor twice.
    needed = sum(spec.nbytes for spec in parameters) + 2 * max(spec.nbytes for spec in parameters) + _MARGIN_BYTES
    available = psutil.virtual_memory().available
    if available < needed:
        return [f"log-probs against transformers: skipped: needs {needed / 1e9:.1f} GB of memory"]
    difference = compare(megatron_dir, hf_dir, arch)
    if difference is None:
        return ["log-probs against transformers: skipped: those of transformers are not finite"]
    if not difference <= MAX_LOG_PROB_DIFFERENCE:
        raise UserError(
            f"verification failed: log-probs of the Megatron model and of transformers differ by {difference:.1e}; "
            "the conversion of this model is wrong: report it with its config.json"
        )
    return [f"log-probs against transformers: largest difference {difference:.1e}"]


def _compare(pairs: _Pairs, advance: Callable[[int], None]) -> Check:
    count = nbytes = source_crc32 = target_crc32 = 0
    different = []
    for name, source, target in pairs:
        source_bytes, target_bytes = _bytes(source), _bytes(target)
        if source.shape != target.shape or not torch.equal(source_bytes, target_bytes):
            different.append(name)
        source_crc32 = zlib.crc32(source_bytes.numpy().data, source_crc32)
        target_crc32 = zlib.crc32(target_bytes.numpy().data, target_crc32)
        count, nbytes = count + 1, nbytes + target.nbytes
        advance(target.nbytes)
    if different:
        raise UserError(
            f"verification failed: what was written differs from the source in {list_names(different)}; "
            "check disk and memory of this machine, and convert again"
        )
    return Check(count, nbytes, source_crc32, target_crc32)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
