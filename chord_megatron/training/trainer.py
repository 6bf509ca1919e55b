"""One optimizer step of CHORD. `ChordTrainer.step` is the whole algorithm on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from chord_megatron.algorithm.advantages import zero_std_fraction
from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.config import Config
from chord_megatron.planning.schedule import mu_at
from chord_megatron.tracking.step_metrics import loss_metrics, rollout_metrics
from chord_megatron.tracking.timers import PhaseTimer
from chord_megatron.training.expert_stream import ExpertStream
from chord_megatron.training.objective import rollout_mean
from chord_megatron.training.rollout_stream import RolloutStream, StepRollouts
from chord_megatron.types import GlobalBatch, Metrics, ScoredRollouts, TrainingSample


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for the logs."""

    metrics: Metrics
    stepped: bool  # False: a non-finite loss or gradient, nothing changed
    rollouts: StepRollouts


@dataclass(frozen=True)
class ChordTrainer:
    """Turns prompts and expert rows into optimizer steps. Every method is a collective call of all ranks."""

    config: Config
    objective: Objective
    engine: MegatronEngine
    rollout_stream: RolloutStream
    expert_stream: ExpertStream
    timer: PhaseTimer

    def step(self, step: int) -> StepResult:
        """Draw rollouts and experts, and take one optimizer step on (1 - mu) L_GRPO + mu L_SFT."""
        with self.timer("step"):
            mu = mu_at(self.config, step)
            rollouts = self.rollout_stream.next(step, mu)
            experts = self.expert_stream.next(mu)
            batch = self.pack([*rollouts.samples, *experts], step)
            with self.timer("train"):
                loss = partial(chord_loss, objective=self.objective, mu=mu)
                totals = self.engine.forward_backward(batch, loss)
                update = self.engine.optimizer_step()
        metrics = {
            **loss_metrics(totals, batch, self.objective, mu),
            "grad_norm": update.grad_norm,
            "lr": update.lr,
            **self.describe(rollouts.scored),
            **self.speed(batch),
        }
        return StepResult(metrics, update.stepped, rollouts)

    def pack(self, samples: Sequence[TrainingSample], step: int) -> GlobalBatch:
        """This rank's micro-batches of the step."""
        train = self.config.train
        return build_global_batch(
            samples,
            self.engine.batch_layout,
            micro_batch_size=train.micro_batch_size,
            shuffle_seed=train.seed + step if train.packing_order == "shuffled" else None,
            rollout_mean=rollout_mean(self.config),
        )

    def describe(self, scored: ScoredRollouts | None) -> Metrics:
        """Rewards and lengths of the step's completions."""
        if scored is None:
            return rollout_metrics(None)
        rewards = torch.tensor(scored.rewards, dtype=torch.float64)
        share = zero_std_fraction(rewards, self.config.rollout.num_generations)
        return {**rollout_metrics(scored), "zero_std_fraction": share}

    def speed(self, batch: GlobalBatch) -> Metrics:
        """Where the time of the step went."""
        times = self.timer.times()
        return {
            **times,
            "time_generation": self.rollout_stream.generation_seconds,
            "tokens_per_second": (batch.num_rollout_tokens + batch.num_expert_tokens) / times["time_step"],
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the streams stand, as plain JSON values."""
        return {
            "prompt_cursor": self.rollout_stream.state_dict(),
            "expert_cursor": self.expert_stream.state_dict(),
            "policy_version": self.engine.policy_version,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` stood.

        Raises UserError when a data set has another size or seed, KeyError or TypeError where the state is none.
        """
        if type(state["policy_version"]) is not int:
            raise TypeError("policy_version is no number")
        self.rollout_stream.load_state_dict(state["prompt_cursor"])
        self.expert_stream.load_state_dict(state["expert_cursor"])
        self.engine.policy_version = state["policy_version"]
