"""What a weight update must consist of: checked by the receiver, before a tensor reaches its model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import xxhash
from torch import Tensor

from chord_megatron.convert.schema import TensorSpec


class ManifestError(ValueError):
    """A weight update that is not the whole model, or not what was sent."""


def checksum(tensor: Tensor) -> str:
    """XXH3-128 of a tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


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
