"""The completions of each step: prompts in order, generation batches that several steps share, drawing ahead."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from chord_megatron.algorithm.advantages import group_advantages
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.batching.samples import rollout_training_samples
from chord_megatron.config import Config
from chord_megatron.data.cursor import ShuffledCursor
from chord_megatron.planning.plan import Plan
from chord_megatron.planning.schedule import mu_range
from chord_megatron.training.sampler import Drawing, Sampler
from chord_megatron.training.scorer import Scorer
from chord_megatron.types import Prompt, SamplingParams, ScoredRollouts, TrainingSample


class StepRollouts(NamedTuple):
    """A step's share of a generation batch."""

    scored: ScoredRollouts | None  # None at mu = 1
    samples: list[TrainingSample]
    new_generation: ScoredRollouts | None  # the whole batch, where this step drew one


class _GenerationBatch(NamedTuple):
    scored: ScoredRollouts
    samples: list[TrainingSample]


class _Ahead(NamedTuple):
    """A generation batch that has been asked for, and where the prompt cursor stood before."""

    prompts: Sequence[Prompt]
    drawing: Drawing
    cursor: dict[str, Any]


class RolloutStream:
    """`next` is a collective call of all ranks."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        sampler: Sampler,
        scorer: Scorer,
        seed: int,
    ) -> None:
        self._config, self._plan, self._prompts, self._params = config, plan, prompts, params
        self._sampler, self._scorer = sampler, scorer
        self._cursor = ShuffledCursor(len(prompts), seed)
        self._ahead: _Ahead | None = None
        self._batch: _GenerationBatch | None = None

    def next(self, step: int, mu: float) -> StepRollouts:
        """This step's completions and training samples; the steps of a generation batch come in order."""
        begins = step % self._plan.steps_per_rollout == 0
        if begins:
            self._batch = self._generate(step) if self._needs_rollouts(step) else None
        if self._batch is None:
            return StepRollouts(None, [], None)
        generation = self._batch.scored if begins else None
        if mu == 1.0:
            return StepRollouts(None, [], generation)
        size = self._plan.completions_per_step
        start = (step % self._config.grpo.steps_per_generation) * size
        return StepRollouts(
            self._batch.scored.slice(start, start + size), self._batch.samples[start : start + size], generation
        )

    @property
    def generation_seconds(self) -> float | None:
        """Of the last batch, from its first request to its last answer; None where the trainer waits all the while."""
        return self._sampler.rollout.generation_seconds

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values."""
        # Completions that are being drawn ahead are not kept: a resumed run asks those prompts again.
        return self._ahead.cursor if self._ahead else self._cursor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises UserError when the data have another size or seed."""
        self._cursor.load_state_dict(state)

    def _needs_rollouts(self, step: int) -> bool:
        return mu_range(self._config, step, step + self._plan.steps_per_rollout)[0] < 1.0

    def _generate(self, step: int) -> _GenerationBatch:
        """A generation batch of scored completions, and the next one asked for where that is due."""
        drawn, self._ahead = self._ahead or self._draw(step), None
        rollouts = drawn.drawing.result()
        next_step = step + self._plan.steps_per_rollout
        if self._config.rollout.max_staleness and next_step < self._config.train.train_iters:
            self._ahead = self._draw(next_step) if self._needs_rollouts(next_step) else None
        scored = self._scorer.score(drawn.prompts, rollouts)
        return _GenerationBatch(scored, self._to_samples(scored))

    def _draw(self, step: int) -> _Ahead:
        cursor = self._cursor.state_dict()
        count = self._plan.prompts_per_step * self._config.grpo.steps_per_generation
        prompts = [self._prompts[i] for i in self._cursor.next(count)]
        num_generations = self._config.rollout.num_generations
        drawing = self._sampler.draw(prompts, self._params, num_generations=num_generations, step=step)
        return _Ahead(prompts, drawing, cursor)

    def _to_samples(self, scored: ScoredRollouts) -> list[TrainingSample]:
        """Advantages, and the log-probs of the policy that drew the completions and of the reference."""
        rewards = torch.tensor(scored.rewards, dtype=torch.float64)
        samples = rollout_training_samples(
            scored.rollouts,
            group_advantages(rewards, self._config.rollout.num_generations),
            temperature=self._config.rollout.temperature,
            overlong_filter=self._config.grpo.overlong_filter,
        )
        if self._plan.steps_per_rollout > 1:
            samples = self._with_log_probs(samples, "old_log_probs")
        if self._config.grpo.beta > 0:
            samples = self._with_log_probs(samples, "ref_log_probs")
        return samples

    def _with_log_probs(
        self, samples: list[TrainingSample], field: Literal["old_log_probs", "ref_log_probs"]
    ) -> list[TrainingSample]:
        engine = self._sampler.engine
        with self._sampler.timer("log_probs"):
            batch = build_global_batch(
                samples, engine.batch_layout, micro_batch_size=self._config.train.micro_batch_size
            )
            rows = engine.compute_log_probs(batch, reference=field == "ref_log_probs")
        changes: list[dict[str, Any]] = [{field: row} for row in rows]
        return [dataclasses.replace(sample, **change) for sample, change in zip(samples, changes)]
