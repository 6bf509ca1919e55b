"""Weight updates between two GPUs by NCCL: what arrives is what was sent, with the checksums of the CPU."""

from __future__ import annotations

import multiprocessing
import socket
from typing import Any

import pytest
import torch

from chord_megatron.rollout.updates.broadcast import BroadcastGroup, pack, unpack
from chord_megatron.rollout.updates.manifest import checksum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs: NCCL wants one for each process"),
]


def group_of(rank: int, port: int, listener: socket.socket | None = None) -> BroadcastGroup:
    device = torch.device("cuda", rank)
    return BroadcastGroup("127.0.0.1", port, rank=rank, world_size=2, device=device, timeout=120.0, listener=listener)


def receive(port: int, headers: list[dict[str, Any]], arrived: Any) -> None:
    group = group_of(1, port)
    for _ in range(3):
        arrived.put([(name, tensor.device.index, checksum(tensor)) for name, tensor in unpack(headers, group)])


def test_a_broadcast_between_gpus():
    generator = torch.Generator().manual_seed(0)
    bucket = {
        "a": torch.randn(1000, 333, generator=generator).bfloat16(),
        "b": torch.randn(7, generator=generator),
        "c": torch.randn(2**24, generator=generator).bfloat16(),
    }
    on_gpu = {name: tensor.cuda(0) for name, tensor in bucket.items()}
    message, headers = pack(on_gpu, torch.device("cuda", 0))
    expected = [(name, 1, checksum(tensor)) for name, tensor in bucket.items()]
    listener = socket.create_server(("127.0.0.1", 0))
    context = multiprocessing.get_context("spawn")
    arrived = context.Queue()
    receiver = context.Process(target=receive, args=(listener.getsockname()[1], headers, arrived), daemon=True)
    receiver.start()
    group = group_of(0, listener.getsockname()[1], listener)
    for _ in range(3):
        group.broadcast(message)
        assert arrived.get(timeout=120) == expected
    receiver.join(60)
    assert receiver.exitcode == 0
