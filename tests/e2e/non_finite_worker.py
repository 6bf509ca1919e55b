"""`chord_megatron.train` whose loss is NaN on one rank at some steps: NON_FINITE="RANK:STEP,STEP,..."."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from chord_megatron.algorithm.objective import chord_loss
from chord_megatron.training import trainer
from chord_megatron.training.main import main

RANK, STEPS = os.environ["NON_FINITE"].split(":")
current_step = -1


def poisoned_loss(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, sums, maximum = chord_loss(*args, **kwargs)
    if os.environ["RANK"] == RANK and current_step in map(int, STEPS.split(",")):
        return loss * torch.nan, sums, maximum
    return loss, sums, maximum


class PoisonedTrainer(trainer.ChordTrainer):
    def take_step(self, step: int) -> trainer.StepResult:
        global current_step
        current_step = step
        return super().take_step(step)


if __name__ == "__main__":
    trainer.chord_loss = poisoned_loss
    sys.modules["chord_megatron.train"].ChordTrainer = PoisonedTrainer
    sys.exit(main())
