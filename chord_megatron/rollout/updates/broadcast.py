"""A weight update broadcast from the trainer's rank 0 to every worker of every server: NCCL between GPUs, else gloo.

A bucket of tensors is one message.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chord_megatron.rollout.updates.manifest import as_bytes, checksum

Json = dict[str, Any]

_MEETING_SECONDS = 120.0  # for all to be there: they are told at the same time
_ALIGNMENT = 16  # bytes: tensors are viewed in place, in any dtype


class BroadcastGroup:
    """Rank 0 sends, all others receive. A group of its own, apart from torch.distributed's default one."""

    def __init__(
        self,
        address: str,
        port: int,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        timeout: float,
        listener: socket.socket | None = None,
    ) -> None:
        """Meet at `address`:`port`, where rank 0 gives its `listener`. Waits for all.

        `timeout`: seconds for a broadcast. Raises RuntimeError where not all came.
        """
        self.device = device
        self._use_device()
        limit = timedelta(seconds=timeout)
        store = dist.PrefixStore(
            "chord_weights",
            dist.TCPStore(
                address,
                port,
                is_master=listener is not None,
                master_listen_fd=listener.detach() if listener is not None else None,
                wait_for_workers=False,
                timeout=timedelta(seconds=min(timeout, _MEETING_SECONDS)),
            ),
        )
        options: Any  # torch's stubs leave out what is set, and the collectives of a backend
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit  # noqa: SLF001 - no argument sets it
            self._group: Any = dist.ProcessGroupNCCL(store, rank, world_size, options)
        else:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001 - has no other name
            options._timeout = limit  # noqa: SLF001 - no argument sets it
            own_address = address if rank == 0 else _address_towards(address, port)
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address)]  # noqa: SLF001 - nor this
            self._group = dist.ProcessGroupGloo(store, rank, world_size, options)

    def broadcast(self, message: Tensor) -> None:
        """Rank 0's bytes (uint8, on `device`) into everyone's; returns when they are there."""
        self._use_device()
        self._group.broadcast(message, 0).wait()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _use_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a setting of the calling thread

    def abort(self) -> None:
        """Give up what is under way."""
        with suppress(RuntimeError):
            self._group.abort()


def pack(bucket: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, list[Json]]:
    """One message of all tensors, and what `unpack` has to know of each."""
    headers = [
        {
            "name": name,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "checksum": checksum(tensor),
        }
        for name, tensor in bucket.items()
    ]
    message = torch.zeros(_size(headers), dtype=torch.uint8, device=device)
    for tensor, (start, end) in zip(bucket.values(), _extents(headers), strict=True):
        message[start:end].copy_(as_bytes(tensor))
    return message, headers


def unpack(headers: Sequence[Json], group: BroadcastGroup) -> Iterator[tuple[str, Tensor]]:
    """Receive one message; (name, tensor) of what is in it, each a view of the message."""
    message = torch.empty(_size(headers), dtype=torch.uint8, device=group.device)
    group.broadcast(message)
    for header, (start, end) in zip(headers, _extents(headers), strict=True):
        yield header["name"], message[start:end].view(_dtype(header)).view(header["shape"])


def _extents(headers: Sequence[Json]) -> list[tuple[int, int]]:
    extents, start = [], 0
    for header in headers:
        end = start + torch.Size(header["shape"]).numel() * _dtype(header).itemsize
        extents.append((start, end))
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
    return extents


def _size(headers: Sequence[Json]) -> int:
    return _extents(headers)[-1][1]


def _dtype(header: Json) -> torch.dtype:
    dtype = getattr(torch, header["dtype"])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _address_towards(address: str, port: int) -> str:
    """This machine's own address on the way to another."""
    with socket.create_connection((address, port)) as connection:
        return connection.getsockname()[0]
