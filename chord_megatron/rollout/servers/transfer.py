"""How the tensors of a weight update reach the servers, as rank 0 sends them; vllm_worker.py is the other end."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from chord_megatron.rollout.servers.pool import ServerPool, UpdateError
from chord_megatron.rollout.updates.broadcast import BroadcastGroup, pack
from chord_megatron.rollout.updates.files import remove_abandoned_weights, save_weight_file, weight_directory
from chord_megatron.rollout.updates.manifest import buckets, checksum
from chord_megatron.system.errors import UserError


class WeightTransfer(Protocol):
    """How the tensors of an update reach the servers."""

    def send(self, pool: ServerPool, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Between the pool's open_update and close_update. Raises UpdateError where no server is left."""
        ...


class FileTransfer:
    """Files that all see. A server that fails does not keep the others from their update."""

    def __init__(self, parent: Path, *, bucket_bytes: int) -> None:
        """`parent`: the directory that all see. What killed trainers left there is removed."""
        remove_abandoned_weights(parent)
        self._parent, self._bucket_bytes = parent, bucket_bytes

    def send(self, pool: ServerPool, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See WeightTransfer. Raises UserError where there is no room."""
        with weight_directory(self._parent) as directory:
            for number, bucket in enumerate(buckets(weights, self._bucket_bytes)):
                path = directory / f"{number}.safetensors"
                save_weight_file(bucket, path)
                checksums = {name: checksum(tensor) for name, tensor in bucket.items()}
                pool.send({"path": str(path), "checksums": checksums})
                path.unlink()


class BroadcastTransfer:
    """One message to all workers of all servers. A server that fails takes the update of all with it.

    The group is built anew where a server came, went or restarted.
    """

    def __init__(self, address: str, *, device: torch.device, bucket_bytes: int, timeout: float) -> None:
        """`address`: of this process, as the servers reach it. `timeout`: seconds for a bucket."""
        self._address, self._device, self._bucket_bytes, self._timeout = address, device, bucket_bytes, timeout
        self._group: BroadcastGroup | None = None
        self._members: Sequence[str] = ()

    def send(self, pool: ServerPool, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See WeightTransfer. Raises UserError where this machine has no such address."""
        try:
            if self._group is None or self._members != pool.updating():
                self._build_group(pool)
            assert self._group is not None
            for bucket in buckets(weights, self._bucket_bytes):
                message, headers = pack(bucket, self._device)
                pool.send({"tensors": headers}, meanwhile=partial(self._group.broadcast, message))
        except UpdateError:
            self._drop_group()
            raise

    def _build_group(self, pool: ServerPool) -> None:
        self._drop_group()
        listener = self._listen()
        port = listener.getsockname()[1]
        num_workers = pool.num_workers()
        world_size = 1 + sum(num_workers)
        shared = {"address": self._address, "port": port, "world_size": world_size, "timeout": self._timeout}

        joined: list[BroadcastGroup] = []

        def join() -> None:
            group = BroadcastGroup(
                self._address,
                port,
                rank=0,
                world_size=world_size,
                device=self._device,
                timeout=self._timeout,
                listener=listener,
            )
            joined.append(group)

        pool.join_group([shared | {"first_rank": 1 + sum(num_workers[:i])} for i in range(len(num_workers))], join)
        (self._group,) = joined
        self._members = pool.updating()

    def _listen(self) -> socket.socket:
        try:
            return socket.create_server((self._address, 0))
        except OSError as error:
            raise UserError(
                f"rollout.weight_transfer_address: rank 0 cannot listen on {self._address} ({error}); name an address "
                "of its machine"
            ) from None

    def _drop_group(self) -> None:
        if self._group is not None:
            self._group.abort()
        self._group, self._members = None, ()
