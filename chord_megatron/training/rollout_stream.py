"""The completions of each step: prompts in order, generation batches that several steps share, drawing ahead."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chord_megatron.algorithm.objective import Objective
from chord_megatron.algorithm.presets import SEMANTICS
from chord_megatron.batching.samples import most_uncertain, rollout_training_samples
from chord_megatron.config import Config
from chord_megatron.data.mixture import cursor_over
from chord_megatron.planning.plan import Plan
from chord_megatron.planning.presets import keeps_filtered
from chord_megatron.planning.schedule import needs_rollouts
from chord_megatron.training.advantages import advantages_of
from chord_megatron.training.packing import pack_all, pack_learnt
from chord_megatron.training.sampler import Drawing, Sampler
from chord_megatron.training.scorer import Scorer
from chord_megatron.types import GlobalBatch, Prompt, RolloutSample, SamplingParams, ScoredRollouts, TrainingSample


class StepRollouts(NamedTuple):
    """A step's share of a generation batch."""

    scored: ScoredRollouts | None  # None at mu = 1
    samples: list[TrainingSample]
    new_generation: ScoredRollouts | None  # the whole batch, where this step drew one
    # The step's own forward pass finds them, and later passes over these completions need them: see `remember`.
    lack_old_log_probs: bool = False
    lack_routing: bool = False


class _GenerationBatch(NamedTuple):
    scored: ScoredRollouts
    samples: list[TrainingSample]


class _Ahead(NamedTuple):
    """A generation batch that has been asked for, and where the prompt cursor stood before."""

    prompts: Sequence[Prompt]
    drawing: Drawing
    cursor: dict[str, Any]


class _LogProbs(NamedTuple):
    """Of each completion's tokens, [length] each; None where nothing needs them."""

    old: list[Tensor] | None
    ref: list[Tensor] | None
    entropies: list[Tensor] | None
    routing: list[Tensor] | None  # of the policy's pass


class RolloutStream:
    """`next` is a collective call of all ranks."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        objective: Objective,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        sampler: Sampler,
        scorer: Scorer,
        seed: int,
    ) -> None:
        self._config, self._plan, self._objective = config, plan, objective
        self._prompts, self._params = prompts, params
        self._sampler, self._scorer = sampler, scorer
        self._cursor = cursor_over(prompts, seed)
        self._draws_at_1 = SEMANTICS[config.chord.semantics].draws_rollouts_at_1
        self._ahead: _Ahead | None = None
        self._batch: _GenerationBatch | None = None

    def next(self, step: int, mu: float) -> StepRollouts:
        """This step's completions and training samples; the steps of a generation batch come in order."""
        begins = step % self._plan.steps_per_rollout == 0
        if begins:
            self._batch = self._generate(step, mu) if self._needs_rollouts(step) else None
        if self._batch is None:
            return StepRollouts(None, [], None)
        generation = self._batch.scored if begins else None
        if not self._learns_at(mu):
            return StepRollouts(None, [], generation)
        size = self._plan.completions_per_step
        start = (step % self._config.grpo.steps_per_generation) * size
        scored, samples = self._batch.scored.slice(start, start + size), self._batch.samples[start : start + size]
        come_again = self._config.grpo.num_iterations > 1
        return StepRollouts(
            scored,
            samples,
            generation,
            lack_old_log_probs=come_again and self._needs_old and samples[0].old_log_probs is None,
            lack_routing=come_again and self._replays and samples[0].routing is None,
        )

    def remember(self, step: int, log_probs: Sequence[Tensor] | None, routing: Sequence[Tensor] | None) -> None:
        """What a step's own pass found of its completions, for the passes to come; None: nothing that they lacked.

        Log-probs of the policy that drew, and experts of the first pass: of each of the step's samples, the completions
        first.
        """
        if log_probs is None and routing is None:
            return
        assert self._batch is not None
        size = self._plan.completions_per_step
        start = (step % self._config.grpo.steps_per_generation) * size
        samples = self._batch.samples
        own = samples[start : start + size]
        if log_probs is not None:
            own = _with_old_log_probs(own, log_probs[:size])
        own = _with_routing(own, routing and routing[:size])
        self._batch = self._batch._replace(samples=samples[:start] + own + samples[start + size :])

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
        return needs_rollouts(self._config, step, step + self._plan.steps_per_rollout)

    def _learns_at(self, mu: float) -> bool:
        return mu < 1 or self._draws_at_1

    @property
    def _needs_old(self) -> bool:
        """Whether the clipped ratio needs the trainer's old log-probs: the policy leaves the one that drew."""
        return self._plan.steps_per_rollout > 1 and self._config.grpo.old_log_probs == "trainer"

    @property
    def _replays(self) -> bool:
        """Whether updates have the experts of the first pass over a completion."""
        return self._config.rollout.router_replay == "trainer"

    def _recorded_routing(self, batch: GlobalBatch) -> AbstractContextManager[list[Tensor] | None]:
        """Of the first pass over a batch, where later ones replay it."""
        return self._sampler.engine.recorded_routing(batch) if self._replays else nullcontext()

    def _generate(self, step: int, mu: float) -> _GenerationBatch:
        """A generation batch of scored completions, and the next one asked for where that is due."""
        drawn, self._ahead = self._ahead or self._draw(step), None
        rollouts = drawn.drawing.result()
        next_step = step + self._plan.steps_per_rollout
        if self._config.rollout.max_staleness and next_step < self._config.train.train_iters:
            self._ahead = self._draw(next_step) if self._needs_rollouts(next_step) else None
        scored = self._scorer.score(drawn.prompts, rollouts)
        return _GenerationBatch(scored, self._to_samples(scored, learns_at_once=self._learns_at(mu)))

    def _draw(self, step: int) -> _Ahead:
        cursor = self._cursor.state_dict()
        count = self._plan.prompts_per_step * self._config.grpo.steps_per_generation
        prompts = [self._prompts[i] for i in self._cursor.next(count)]
        num_generations = self._config.rollout.num_generations
        drawing = self._sampler.draw(prompts, self._params, num_generations=num_generations, step=step)
        return _Ahead(prompts, drawing, cursor)

    def _to_samples(self, scored: ScoredRollouts, *, learns_at_once: bool) -> list[TrainingSample]:
        """Advantages, and the log-probs of the policy that drew the completions and of the reference.

        learns_at_once: whether the batch's first step does.
        """
        config, grpo = self._config, self._config.grpo
        old, ref, entropies, routing = self._log_probs(scored.rollouts)
        if grpo.kl_in_reward:
            assert ref is not None
            of_sampler = (_recorded(rollout, row) for rollout, row in zip(scored.rollouts, ref))
            drawn_at = of_sampler if grpo.old_log_probs == "sampler" else old or ()
            penalties = (grpo.beta * (a.double() - b.double()).sum().item() for a, b in zip(drawn_at, ref, strict=True))
            rewards = tuple(reward - penalty for reward, penalty in zip(scored.rewards, penalties))
            scored = dataclasses.replace(scored, rewards=rewards)
        samples = rollout_training_samples(
            scored.rollouts,
            advantages_of(scored, config),
            temperature=config.rollout.temperature,
            overlong_filter=grpo.overlong_filter,
            keeps_filtered=keeps_filtered(config),
            rewards=scored.rewards,
        )
        if ref is not None:
            samples = [dataclasses.replace(sample, ref_log_probs=row) for sample, row in zip(samples, ref)]
        samples = _with_routing(samples, routing)
        if entropies is not None:
            samples = self._most_uncertain(samples, entropies)
        if self._needs_old:
            samples = self._with_old(samples, old, learns_at_once=learns_at_once)
        return samples

    def _with_old(
        self, samples: list[TrainingSample], old: list[Tensor] | None, *, learns_at_once: bool
    ) -> list[TrainingSample]:
        """With old log-probs: those that are known, or of one more forward pass over what the first step leaves.

        Its own completions get none: the ratio is 1 there, and its pass finds what later ones need. Where it learns
        nothing, they are for later passes alone.
        """
        if old is not None:
            return _with_old_log_probs(samples, old)
        is_first_found = learns_at_once or self._config.grpo.num_iterations == 1
        start = self._plan.completions_per_step if is_first_found else 0
        if start == len(samples):
            return samples
        engine = self._sampler.engine
        with self._sampler.timer("log_probs"):
            batch = pack_learnt(samples[start:], engine.batch_layout, self._config, self._objective)
            with self._recorded_routing(batch) as routing:
                found = engine.compute_log_probs(batch)
        return samples[:start] + _with_routing(_with_old_log_probs(samples[start:], found), routing)

    def _most_uncertain(self, samples: list[TrainingSample], entropies: list[Tensor]) -> list[TrainingSample]:
        """With an advantage on the tokens of the highest entropy only, those of each step by themselves."""
        size, share = self._plan.completions_per_step, self._config.grpo.top_entropy_quantile
        steps = range(0, len(samples), size)
        kept = (most_uncertain(samples[i : i + size], entropies[i : i + size], share) for i in steps)
        return [sample for step in kept for sample in step]

    def _log_probs(self, rollouts: Sequence[RolloutSample]) -> _LogProbs:
        """What advantages and penalties need of these. Filtered completions have theirs: their rewards count, too."""
        grpo, engine = self._config.grpo, self._sampler.engine
        wants_entropies = grpo.top_entropy_quantile < 1
        wants_old = grpo.kl_in_reward and grpo.old_log_probs == "trainer"
        if not (wants_entropies or wants_old or grpo.beta):
            return _LogProbs(None, None, None, None)
        samples = rollout_training_samples(
            rollouts, torch.zeros(len(rollouts)), temperature=self._config.rollout.temperature, overlong_filter=False
        )
        with self._sampler.timer("log_probs"):
            batch = pack_all(samples, engine.batch_layout, self._config)
            old, entropies, routing = None, None, None
            if wants_entropies or wants_old:
                with self._recorded_routing(batch) as routing:
                    if wants_entropies:
                        old, entropies = engine.compute_log_probs_and_entropies(batch)
                    else:
                        old = engine.compute_log_probs(batch)
            ref = engine.compute_log_probs(batch, reference=True) if grpo.beta else None
        return _LogProbs(old, ref, entropies, routing)


def _with_old_log_probs(samples: Sequence[TrainingSample], rows: Sequence[Tensor]) -> list[TrainingSample]:
    return [dataclasses.replace(sample, old_log_probs=row) for sample, row in zip(samples, rows, strict=True)]


def _with_routing(samples: list[TrainingSample], rows: Sequence[Tensor] | None) -> list[TrainingSample]:
    if rows is None:
        return samples
    return [dataclasses.replace(sample, routing=row) for sample, row in zip(samples, rows, strict=True)]


def _recorded(rollout: RolloutSample, ref_log_probs: Tensor) -> Tensor:
    """The sampler's log-probs; the reference's, which add no penalty, where it recorded no finite number."""
    return torch.where(rollout.rollout_log_probs.isfinite(), rollout.rollout_log_probs, ref_log_probs)
