"""Trains configurations one after the other in the same processes; of each keeps the master weights of every step."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

import torch

from chord_megatron.backend.groups import shut_down_distributed
from chord_megatron.backend.model import unwrap
from chord_megatron.config import load_config
from chord_megatron.training.outputs import RunOutputs
from chord_megatron.training.run import Run


class RecordedRun(Run):
    """Writes (parameter, master weight) of rank 0 by name to masters.pt, a dictionary for each step."""

    def __init__(self, config: Path) -> None:
        self.steps: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
        super().__init__(load_config(config))

    def _save(self, told: int) -> None:
        parameters = unwrap(self.engine._chunks[0]).named_parameters()
        # Float32 parameters are their own masters, and the optimizer keeps no others.
        self.steps.append({n: (p.detach().clone(), getattr(p, "main_param", p).clone()) for n, p in parameters})

    def train(self) -> None:
        super().train()
        if self.groups.rank == 0:
            torch.save(self.steps, self.run_dir.path / "masters.pt")


if __name__ == "__main__":
    with patch.object(RunOutputs, "finish"):  # plots take longer than the steps
        for path in sys.argv[1:]:
            RecordedRun(Path(path)).train()
    shut_down_distributed()
