"""Memory that goes to the host and comes back below living tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chord_megatron.backend import offload
from chord_megatron.backend.offload import HostMemory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 bytes: most storages below lie across several, and start within one."""
    monkeypatch.setattr(offload, "PIECE_BYTES", 16)


def make_tensors() -> dict[str, Tensor]:
    """A buffer of 40 bytes with two views, a parameter of its own of 6, one of a single byte, an empty one."""
    buffer = torch.arange(10, dtype=torch.float32)
    return {
        "buffer": buffer,
        "middle": buffer[3:9].view(2, 3),
        "transposed": buffer.view(2, 5).t(),
        "bfloat16": torch.nn.Parameter(torch.tensor([1.5, -0.0, torch.nan], dtype=torch.bfloat16)),
        "byte": torch.tensor(7, dtype=torch.uint8),
        "empty": torch.zeros(0),
    }


def storage_bytes(tensors: dict[str, Tensor]) -> list[int]:
    return [tensor.untyped_storage().nbytes() for tensor in tensors.values()]


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


def test_tensors_and_views_come_back_bitwise_in_the_same_objects():
    tensors, wanted = make_tensors(), [bits(tensor) for tensor in make_tensors().values()]
    sizes = storage_bytes(tensors)
    memory = HostMemory(CPU)
    for _ in range(2):
        memory.offload(tensors.values())
        assert storage_bytes(tensors) == [0] * len(tensors)
        other_use = [torch.full((size,), 255, dtype=torch.uint8) for size in sizes]
        memory.restore()
        del other_use
        assert storage_bytes(tensors) == sizes == [40, 40, 40, 6, 1, 0]
        assert [bits(tensor) for tensor in tensors.values()] == wanted
    tensors["middle"][0, 0] = 30.0  # element 3 of the buffer
    assert tensors["buffer"][3] == tensors["transposed"][3, 0] == 30.0


def test_shared_memory_is_moved_once_and_the_host_pieces_are_used_again():
    tensors = make_tensors()
    memory = HostMemory(CPU)
    memory.offload(tensors.values())
    pieces = [piece.data_ptr() for piece in memory._pieces]
    assert len(pieces) == 3  # 40 + 6 + 1 bytes
    memory.restore()
    tensors["buffer"].add_(1)
    memory.offload(tensors.values())
    assert [piece.data_ptr() for piece in memory._pieces] == pieces
    memory.restore()
    assert tensors["buffer"].tolist() == list(range(1, 11))


def test_dropped_tensors_come_back_as_zeros_and_take_no_host_memory():
    kept, dropped = torch.ones(2), torch.ones(100)
    memory = HostMemory(CPU)
    memory.offload([kept], [dropped, dropped[5:]])
    assert storage_bytes({"kept": kept, "dropped": dropped}) == [0, 0]
    assert len(memory._pieces) == 1
    memory.restore()
    assert kept.tolist() == [1.0, 1.0]
    assert dropped.tolist() == [0.0] * 100


def test_nothing_changes_where_the_host_has_too_little_memory(monkeypatch: pytest.MonkeyPatch):
    tensors, wanted = make_tensors(), [bits(tensor) for tensor in make_tensors().values()]
    memory = HostMemory(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(offload, "PIECE_BYTES", 2**62)  # no machine has that
        with pytest.raises(RuntimeError, match="memory"):
            memory.offload(tensors.values())
    assert [bits(tensor) for tensor in tensors.values()] == wanted
    memory.offload(tensors.values())
    memory.restore()
    assert [bits(tensor) for tensor in tensors.values()] == wanted


def test_offloading_twice_or_ambiguously_is_refused():
    tensor = torch.ones(3)
    memory = HostMemory(CPU)
    with pytest.raises(AssertionError, match="share memory"):
        memory.offload([tensor], [tensor[1:]])
    memory.offload([tensor])
    with pytest.raises(AssertionError, match="already"):
        memory.offload([torch.ones(1)])
    memory.restore()
    assert tensor.tolist() == [1.0, 1.0, 1.0]
