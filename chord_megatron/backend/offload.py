"""Moves the trainer's memory to the host and back in place, so that another engine can have it meanwhile.

What moves is the storage below a tensor, so every view of it stays valid: Megatron-Core's parameter and gradient
buffers and their buckets, parameters that lie in such a buffer, the distributed optimizer's shards. Its own helpers,
all named offload_to_cpu, exchange the tensors instead (MegatronOptimizer), or know some of the buffers only
(_ParamAndGradBuffer).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage

# torch rounds pinned memory up to a power of two (CachingHostAllocator.h), which would double that of a model of
# 33 GB. Laid end to end over pieces of such a size, only the rest of the last piece is wasted.
PIECE_BYTES = 2**26


class HostMemory:
    """Holds what was in the tensors' memory while that is free; its pieces are kept for the next time."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pieces: list[Tensor] = []  # [PIECE_BYTES] uint8 each; pinned, which is slow to get, for fast copies
        self._kept: list[tuple[UntypedStorage, int]] = []  # with their bytes
        self._dropped: list[tuple[UntypedStorage, int]] = []

    @torch.no_grad()
    def offload(self, kept: Iterable[Tensor], dropped: Iterable[Tensor] = ()) -> None:
        """Free the memory of all these tensors; `restore` brings `kept` back as they are and `dropped` as zeros.

        Nothing has changed where it raises, for instance for want of host memory.
        """
        assert not self._kept and not self._dropped, "offloaded already"
        keep, drop = _storages(kept), _storages(dropped)
        assert not keep.keys() & drop.keys(), "kept and dropped tensors share memory"
        for memory, host in self._pair(keep.values()):
            host.copy_(memory, non_blocking=True)
        self._synchronize()
        self._kept = [(storage, storage.nbytes()) for storage in keep.values()]
        self._dropped = [(storage, storage.nbytes()) for storage in drop.values()]
        for storage, _ in self._kept + self._dropped:
            storage.resize_(0)
        if self._on_gpu:
            torch.cuda.empty_cache()

    @torch.no_grad()
    def restore(self) -> None:
        """Undo `offload`."""
        for storage, size in self._kept + self._dropped:
            storage.resize_(size)
        for storage, _ in self._dropped:
            _bytes(storage).zero_()
        for memory, host in self._pair(storage for storage, _ in self._kept):
            memory.copy_(host, non_blocking=True)
        self._synchronize()
        self._kept, self._dropped = [], []

    def _pair(self, storages: Iterable[UntypedStorage]) -> Iterator[tuple[Tensor, Tensor]]:
        """(part of a storage, its place on the host), the storages laid end to end; [bytes] uint8 each."""
        offset = 0
        for storage in storages:
            memory = _bytes(storage)
            while len(memory):
                index, start = divmod(offset, PIECE_BYTES)
                if index == len(self._pieces):
                    self._pieces.append(torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self._on_gpu))
                host = self._pieces[index][start : start + len(memory)]
                yield memory[: len(host)], host
                memory = memory[len(host) :]
                offset += len(host)

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def optimizer_tensors(optimizer: Any, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Master weights and moments of a Megatron-Core optimizer on the device, as far as it has them yet.

    Not the model's `parameters`, whose float32 ones are their own master weights.
    """
    of_model, device = _storages(parameters), parameters[0].device
    tensors = []
    for inner in optimizer.chained_optimizers:
        tensors += inner.get_parameters()
        for state in inner.optimizer.state.values():
            # Numbers are step counts: too small to move, and torch's Adam has them on the host anyway.
            tensors += [value for value in state.values() if isinstance(value, Tensor) and value.ndim > 0]
    there = [tensor for tensor in tensors if tensor.device == device]  # HybridDeviceOptimizer has others on the host
    return [tensor for tensor in there if tensor.untyped_storage().data_ptr() not in of_model]


def _storages(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """The storages below the tensors, each once, by address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def _bytes(storage: UntypedStorage) -> Tensor:
    """[bytes] uint8, a view of it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
