"""What a weight update consists of: cut into buckets by its sender, checked by its receiver before it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from chord_megatron.weights.schema import TensorSpec

_ROW_BYTES = 8192


class ManifestError(ValueError):
    """A weight update that is not the whole model, or not what was sent."""


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes (uint8, one dimension)."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def checksum(tensor: Tensor) -> str:
    """128 bits that tell damaged and exchanged tensors apart, computed where the tensor is; no defence against intent.

    The bytes as a matrix of int64, its rows and its columns summed modulo 2^64, each sum weighted by its place.
    """
    content = as_bytes(tensor)
    padded = F.pad(content, (0, -len(content) % _ROW_BYTES)) if len(content) % _ROW_BYTES else content
    if padded.storage_offset() % 8 or padded.data_ptr() % 8:
        padded = padded.clone()
    words = padded.view(torch.int64).view(-1, _ROW_BYTES // 8)
    rows, columns = (_weighted_sum(words.sum(dim)) for dim in (1, 0))
    return f"{(rows + len(content)) % 2**64:016x}{columns % 2**64:016x}"


def _weighted_sum(values: Tensor) -> int:
    return int((values * (2 * torch.arange(len(values), device=values.device) + 1)).sum())


def buckets(weights: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The weights in their order, as many at a time as `bucket_bytes` hold; a larger tensor comes alone."""
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor.contiguous()
        size += tensor.nbytes
    if bucket:
        yield bucket


class Manifest:
    """Every tensor of the model exactly once, in its dtype and shape, with the sender's checksum."""

    def __init__(self, expected: Mapping[str, TensorSpec]) -> None:
        self._expected = dict(expected)
        self._missing = dict(expected)

    def checked(
        self, weights: Iterable[tuple[str, Tensor]], checksums: Mapping[str, str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The same pairs. Raises ManifestError at the first that is unknown, doubled, damaged or of another form."""
        for name, tensor in weights:
            self._check(name, tensor)
            if checksums is not None and checksums.get(name) != checksum(tensor):
                raise ManifestError(f"{name} arrived with other bytes than were sent")
            del self._missing[name]
            yield name, tensor

    def check_complete(self) -> None:
        """Raises ManifestError where tensors did not arrive."""
        if self._missing:
            names = sorted(self._missing)
            raise ManifestError(f"{len(names)} of {len(self._expected)} tensors did not arrive: {', '.join(names[:5])}")

    def _check(self, name: str, tensor: Tensor) -> None:
        spec = self._expected.get(name)
        if spec is None:
            raise ManifestError(f"the model has no tensor {name}")
        if name not in self._missing:
            raise ManifestError(f"{name} arrived twice")
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != tuple(spec.shape):
            raise ManifestError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} where the model has {spec.dtype} {list(spec.shape)}"
            )
