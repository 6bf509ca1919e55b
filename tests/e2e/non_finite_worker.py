"""`chord_megatron.train` whose loss is NaN on one rank at some steps: NON_FINITE="RANK:STEP,STEP,..."."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from chord_megatron.algorithm.objective import chord_loss
from chord_megatron.training import trainer
from chord_megatron.training.main import main
from chord_megatron.types import LossResult

RANK, STEPS = os.environ["NON_FINITE"].split(":")
current_step = -1


def poisoned_loss(*args: Any, **kwargs: Any) -> LossResult:
    result = chord_loss(*args, **kwargs)
    if os.environ["RANK"] == RANK and current_step in map(int, STEPS.split(",")):
        return result._replace(loss=result.loss * torch.nan)
    return result


class PoisonedTrainer(trainer.ChordTrainer):
    def step(self, step: int) -> trainer.StepResult:
        global current_step
        current_step = step
        return super().step(step)


if __name__ == "__main__":
    trainer.chord_loss = poisoned_loss
    sys.modules["chord_megatron.training.run"].ChordTrainer = PoisonedTrainer
    sys.exit(main())
