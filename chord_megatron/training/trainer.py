"""One optimizer step of CHORD. `ChordTrainer.step` is the whole algorithm on a page."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chord_megatron.algorithm.advantages import zero_std_fraction
from chord_megatron.algorithm.aggregation import Mean
from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.config import Config
from chord_megatron.tracking.step_metrics import (
    ExpertRow,
    expert_rows,
    gradient_metrics,
    idle_row_fraction,
    loss_metrics,
    rollout_metrics,
    router_metrics,
)
from chord_megatron.tracking.timers import PhaseTimer
from chord_megatron.training.expert_stream import ExpertStream
from chord_megatron.training.mu_control import MuControl
from chord_megatron.training.packing import pack_step
from chord_megatron.training.rollout_stream import RolloutStream, StepRollouts
from chord_megatron.types import (
    GlobalBatch,
    GradientComparison,
    LossResult,
    Metrics,
    MicroBatch,
    ScoredRollouts,
)


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for the logs."""

    metrics: Metrics
    stepped: bool  # False: a non-finite loss or gradient, nothing changed
    rollouts: StepRollouts
    expert_rows: list[ExpertRow]


@dataclass(frozen=True)
class ChordTrainer:
    """Turns prompts and expert rows into optimizer steps. Every method is a collective call of all ranks."""

    config: Config
    objective: Objective
    means: tuple[Mean, Mean]  # of the rollout and of the expert stream
    engine: MegatronEngine
    rollout_stream: RolloutStream
    expert_stream: ExpertStream
    mu: MuControl
    timer: PhaseTimer

    def step(self, step: int) -> StepResult:
        """Draw rollouts and experts, and take one optimizer step on (1 - mu) L_GRPO + mu L_SFT."""
        with self.timer("step"):
            mu = self.mu.at(step)
            rollouts = self.rollout_stream.next(step, mu)
            experts = self.expert_stream.next(mu)
            batch = pack_step(
                [*rollouts.samples, *experts],
                self.engine.batch_layout,
                self.config,
                step=step,
                objective=self.objective,
                means=self.means,
            )
            with self.timer("train"):
                gradients = self.compare_gradients(batch) if self.is_diagnosed(step) else None
                with self.engine.recorded_routing(batch) if rollouts.lack_routing else nullcontext() as routing:
                    totals = self.engine.forward_backward(
                        batch, self.loss(mu), keep_log_probs=rollouts.lack_old_log_probs
                    )
                counts = self.engine.count_routing()
                update = self.engine.optimizer_step()
        self.rollout_stream.remember(step, totals.log_probs, routing)
        described = self.describe(rollouts.scored)
        self.mu.observe(step, described["reward_mean"], gradients)
        metrics = {
            **loss_metrics(totals, batch, self.objective, mu),
            "idle_row_fraction": idle_row_fraction(totals, len(rollouts.samples)),
            **router_metrics(counts),
            "grad_norm": update.grad_norm,
            **(gradient_metrics(gradients, mu) if self.is_diagnosed(step) else {}),
            "lr": update.lr,
            **described,
            **self.speed(batch),
        }
        return StepResult(metrics, update.stepped, rollouts, expert_rows(totals, experts))

    def loss(self, mu: float) -> Callable[[Tensor, Tensor, MicroBatch], LossResult]:
        """What the engine minimises; at 0 and 1 one stream alone."""
        return partial(chord_loss, objective=self.objective, mu=mu, cp_group=self.engine.groups.cp_group)

    def is_diagnosed(self, step: int) -> bool:
        """Whether the gradients of the two streams are compared at this step."""
        diagnose_steps = self.config.tracking.diagnose_steps
        is_due = diagnose_steps is not None and step % diagnose_steps == 0
        return is_due or self.mu.measures_gradients(step)

    def compare_gradients(self, batch: GlobalBatch) -> GradientComparison | None:
        """Of the rollout stream's loss and the expert stream's; None where one is empty."""
        if not batch.num_rollout_tokens or not batch.num_expert_tokens:
            return None
        return self.engine.compare_gradients(batch, self.loss(0.0), self.loss(1.0))

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
            "mu": self.mu.state_dict(),
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
        self.mu.load_state_dict(state.get("mu", {}))  # checkpoints of older releases have none
        self.engine.policy_version = state["policy_version"]
