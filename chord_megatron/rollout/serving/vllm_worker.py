"""What runs inside vLLM's workers: receiving weights, each update checked against the model's own configuration.

vLLM imports this module for its `WorkerExtension` before it builds a worker's weight-transfer engine, which is why
the transfer engine is registered on import.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from chord_megatron.rollout.updates.broadcast import BroadcastGroup, unpack
from chord_megatron.rollout.updates.files import read_weight_file
from chord_megatron.rollout.updates.manifest import Manifest
from chord_megatron.weights.hf_config import read_architecture
from chord_megatron.weights.mapping import hf_tensors


class _LoadsWeights(Protocol):
    """What all of vLLM's models have."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> object: ...


class WorkerExtension:
    """Has no methods: naming it makes vLLM import this module."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The group of updates/broadcast.py: where it meets, and the rank of this server's first worker."""

    address: str
    port: int
    world_size: int
    first_rank: int
    timeout: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One bucket: a file and its checksums as of updates/files.py, or headers as of updates/broadcast.py."""

    path: str | None = None
    checksums: dict[str, str] = field(default_factory=dict)
    tensors: list[dict[str, Any]] = field(default_factory=list)


class CheckedWeightTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Weights from files or from a broadcast; the same on CPU and CUDA."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _group: BroadcastGroup | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.shutdown()
        parallel = self.parallel_config
        self._group = BroadcastGroup(
            init_info.address,
            init_info.port,
            rank=init_info.first_rank + parallel.data_parallel_index * parallel.world_size + parallel.rank,
            world_size=init_info.world_size,
            device=self.device,
            timeout=init_info.timeout,
        )

    def start_weight_update(self) -> None:
        # What an update consists of, by the configuration that this engine was started with.
        arch = read_architecture(Path(self.model_config.model))
        dtype = self.model_config.dtype
        assert isinstance(dtype, torch.dtype)  # vLLM has read the name by now
        self._manifest = Manifest(hf_tensors(arch, dtype))
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, whose `torch.accelerator.synchronize` needs an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.path is not None:
            arrived, checksums = read_weight_file(Path(update_info.path)), update_info.checksums
        else:
            assert self._group is not None
            arrived = unpack(update_info.tensors, self._group)
            checksums = {header["name"]: header["checksum"] for header in update_info.tensors}
        # All are checked before the first is loaded.
        cast(_LoadsWeights, self.model).load_weights(list(self._manifest.checked(arrived, checksums)))

    def finish_weight_update(self) -> None:
        self._manifest.check_complete()
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.abort()
        self._group = None


WeightTransferEngineFactory.register_engine("chord", CheckedWeightTransfer)
