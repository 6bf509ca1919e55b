"""What runs inside vLLM's workers: receiving weights, each update checked against the model's own configuration.

vLLM imports this module for its `WorkerExtension` before it builds a worker's weight-transfer engine, which is why
the transfer engine is registered on import.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from chord_megatron.convert.hf_config import read_architecture
from chord_megatron.convert.mapping import hf_tensors
from chord_megatron.rollout.manifest import Manifest
from chord_megatron.rollout.weight_files import read_weight_file


class WorkerExtension:
    """Has no methods: naming it makes vLLM import this module."""


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """One bucket: a file as of weight_files.py, and the checksums that its sender computed."""

    path: str
    checksums: dict[str, str] = field(default_factory=dict)


class FileWeightTransfer(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Weights through files in memory or on a shared disk; the same on CPU and CUDA."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        # What an update consists of, by the configuration that this engine was started with.
        arch = read_architecture(Path(self.model_config.model))
        self._manifest = Manifest(hf_tensors(arch, self.model_config.dtype))
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, whose `torch.accelerator.synchronize` needs an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        # All are checked before the first is loaded.
        weights = list(self._manifest.checked(read_weight_file(Path(update_info.path)), update_info.checksums))
        self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        self._manifest.check_complete()
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to do."""


WeightTransferEngineFactory.register_engine("chord_file", FileWeightTransfer)
