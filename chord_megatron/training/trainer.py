"""One optimizer step of CHORD, phase by phase. `ChordTrainer.step` is the whole algorithm on a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, TypeVar

import torch

from chord_megatron.algorithm.advantages import group_advantages, zero_std_fraction
from chord_megatron.algorithm.objective import METRIC_SUMS, chord_loss
from chord_megatron.backend.engine import MegatronEngine, OptimizerStep
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.batching.samples import expert_training_samples, rollout_training_samples
from chord_megatron.config import Config
from chord_megatron.data.cursor import ShuffledCursor
from chord_megatron.data.load import RunData
from chord_megatron.planning.plan import Plan
from chord_megatron.planning.streams import mu_at
from chord_megatron.rewards.functions import RewardFunctions
from chord_megatron.rewards.scoring import score_rollouts
from chord_megatron.tracking.step_metrics import loss_metrics, rollout_metrics
from chord_megatron.tracking.timers import PhaseTimer
from chord_megatron.training.sampler import Drawing, Sampler
from chord_megatron.types import GlobalBatch, Prompt, RolloutSample, SamplingParams, ScoredRollouts, TrainingSample

F = TypeVar("F", bound=Callable[..., Any])
Metrics = dict[str, float | int | None]

_EVALUATION = 2**32 - 1  # the step that seeds evaluations: none of training's


def timed(phase: str) -> Callable[[F], F]:
    """Charge a method's time to a phase of the step."""

    def decorate(method: F) -> F:
        @wraps(method)
        def run(self: ChordTrainer, *args: Any, **kwargs: Any) -> Any:
            with self.timer(phase):
                return method(self, *args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step leaves for the logs."""

    metrics: Metrics
    stepped: bool  # False: a non-finite loss or gradient, nothing changed
    scored: ScoredRollouts | None  # this step's completions; None at mu = 1
    new_generation: ScoredRollouts | None  # the generation batch, where this step drew one


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A generation batch that has been asked for, and where the prompt cursor stood before."""

    prompts: Sequence[Prompt]
    drawing: Drawing
    cursor: dict[str, Any]


class ChordTrainer:
    """Turns prompts and expert rows into optimizer steps. Every method is a collective call of all ranks."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        data: RunData,
        tokenizer: Any,
        engine: MegatronEngine,
        sampler: Sampler,
        eval_sampler: Sampler,
        reward_function: RewardFunctions,
        stop_token_ids: tuple[int, ...],
        timer: PhaseTimer,
    ) -> None:
        self.config, self.plan, self.data, self.tokenizer = config, plan, data, tokenizer
        self.engine, self.sampler, self.eval_sampler = engine, sampler, eval_sampler
        self.reward_function, self.timer = reward_function, timer
        # Two streams of numbers, so that the two data sets are not shuffled alike.
        self.prompt_cursor = ShuffledCursor(len(data.prompts), 2 * config.train.seed)
        self.expert_cursor = ShuffledCursor(max(1, len(data.experts)), 2 * config.train.seed + 1)
        self.policy_version = 0
        self._ahead: _Batch | None = None
        self._generation: ScoredRollouts | None = None
        self._generation_samples: list[TrainingSample] = []
        self._sampling = SamplingParams(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            max_completion_length=config.rollout.max_completion_length,
            stop_token_ids=stop_token_ids,
        )

    def step(self, step: int) -> StepResult:
        """`take_step`, with where its time went."""
        with self.timer("step"):
            result = self.take_step(step)
        times = self.timer.times()
        times["time_generation"] = self.sampler.rollout.generation_seconds
        num_tokens = (result.metrics["num_rollout_tokens"] or 0) + (result.metrics["num_expert_tokens"] or 0)
        result.metrics.update(times, tokens_per_second=num_tokens / times["time_step"])
        return result

    def take_step(self, step: int) -> StepResult:
        """Draw rollouts and experts, and take one optimizer step on (1 - mu) L_GRPO + mu L_SFT."""
        mu = mu_at(self.config, step)
        begins = step % self.plan.steps_per_rollout == 0
        if begins:
            self._generation = self.generate(step)
            self._generation_samples = self.to_training_samples(self._generation)
        scored, samples = self.rollouts_of(step, mu)
        batch = self.pack(samples + self.draw_experts(mu), step)
        metrics = self.forward_backward(batch, mu)
        update = self.optimizer_step()
        metrics.update(grad_norm=update.grad_norm, lr=update.lr, **self.describe(scored))
        return StepResult(metrics, update.stepped, scored, new_generation=self._generation if begins else None)

    def generate(self, step: int) -> ScoredRollouts | None:
        """A generation batch of scored completions for the steps that share it; None when all have mu = 1."""
        if not self._needs_rollouts(step):
            return None
        drawn, self._ahead = self._ahead or self._draw_batch(step), None
        rollouts = drawn.drawing.result()
        next_step = step + self.plan.steps_per_rollout
        if self.config.rollout.max_staleness and next_step < self.config.train.train_iters:
            self._ahead = self._draw_batch(next_step) if self._needs_rollouts(next_step) else None
        return self._score(drawn.prompts, rollouts)

    def to_training_samples(self, scored: ScoredRollouts | None) -> list[TrainingSample]:
        """Advantages, and the log-probs of the policy that drew the completions and of the reference."""
        if scored is None:
            return []
        advantages = group_advantages(
            torch.tensor(scored.rewards, dtype=torch.float64), self.config.rollout.num_generations
        )
        samples = rollout_training_samples(
            scored.rollouts,
            advantages,
            temperature=self.config.rollout.temperature,
            overlong_filter=self.config.grpo.overlong_filter,
        )
        if self.plan.steps_per_rollout > 1:
            samples = self._with_log_probs(samples, "old_log_probs")
        if self.config.grpo.beta > 0:
            samples = self._with_log_probs(samples, "ref_log_probs")
        return samples

    def rollouts_of(self, step: int, mu: float) -> tuple[ScoredRollouts | None, list[TrainingSample]]:
        """This step's share of the generation batch."""
        if self._generation is None or mu == 1.0:
            return None, []
        size = self.plan.completions_per_step
        start = (step % self.config.grpo.steps_per_generation) * size
        return self._generation.slice(start, start + size), self._generation_samples[start : start + size]

    def draw_experts(self, mu: float) -> list[TrainingSample]:
        """The next expert rows; none, and the cursor stays, at mu = 0."""
        if mu == 0.0:
            return []
        rows = self.expert_cursor.next(self.plan.expert_rows_per_step)
        return expert_training_samples([self.data.experts[i] for i in rows])

    def pack(self, samples: Sequence[TrainingSample], step: int) -> GlobalBatch:
        """This rank's micro-batches of the step."""
        train = self.config.train
        return build_global_batch(
            samples,
            micro_batch_size=train.micro_batch_size,
            shuffle_seed=train.seed + step if train.packing_order == "shuffled" else None,
            loss_type=self.config.grpo.loss_type,
            max_completion_length=self.config.rollout.max_completion_length,
            **self.engine.packing,
        )

    @timed("train")
    def forward_backward(self, batch: GlobalBatch, mu: float) -> Metrics:
        """Accumulate the gradient; returns the loss metrics."""
        grpo = self.config.grpo
        loss_function = partial(
            chord_loss,
            mu=mu,
            epsilon=grpo.epsilon,
            epsilon_high=grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high,
            beta=grpo.beta,
            use_phi=self.config.chord.chord_enable_phi_function,
            rollout_importance_sampling_mode=grpo.rollout_importance_sampling_mode,
            rollout_importance_sampling_threshold=grpo.rollout_importance_sampling_threshold,
        )
        sums, largest_difference = self.engine.forward_backward(batch, loss_function)
        named = dict(zip(METRIC_SUMS, sums, strict=True))
        return loss_metrics(
            named,
            largest_difference,
            batch,
            mu=mu,
            has_reference=grpo.beta > 0,
            has_importance_weights=grpo.rollout_importance_sampling_mode is not None,
        )

    @timed("train")
    def optimizer_step(self) -> OptimizerStep:
        """Update the policy; its version counts the updates."""
        update = self.engine.optimizer_step()
        self.policy_version += update.stepped
        return update

    def evaluate(self) -> tuple[Metrics, ScoredRollouts]:
        """One completion of each held-out prompt at train.eval_temperature; the cursors stay."""
        params = dataclasses.replace(self._sampling, temperature=self.config.train.eval_temperature, top_p=1.0, top_k=0)
        if self._ahead:
            self._ahead.drawing.result()  # evaluations change the sampler's weights
        prompts = self.data.eval_prompts
        drawing = self._draw(self.eval_sampler, prompts, params, 1, _EVALUATION)
        scored = self._score(prompts, drawing.result())
        self.timer.times()  # evaluations are not part of a step
        metrics = rollout_metrics(scored.rollouts, scored.rewards, scored.rewards_by_function)
        return {f"eval_{name}": value for name, value in metrics.items()}, scored

    def describe(self, scored: ScoredRollouts | None) -> Metrics:
        """Rewards and lengths of the step's completions."""
        if scored is None:
            return rollout_metrics((), (), {})
        metrics = rollout_metrics(scored.rollouts, scored.rewards, scored.rewards_by_function)
        rewards = torch.tensor(scored.rewards, dtype=torch.float64)
        metrics["zero_std_fraction"] = zero_std_fraction(rewards, self.config.rollout.num_generations)
        return metrics

    def close(self) -> None:
        """End what runs outside this process."""
        self.sampler.rollout.close()
        self.reward_function.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the streams stand, as plain JSON values."""
        return {
            # Completions that are being drawn ahead are not kept: a resumed run asks those prompts again.
            "prompt_cursor": self._ahead.cursor if self._ahead else self.prompt_cursor.state_dict(),
            "expert_cursor": self.expert_cursor.state_dict(),
            "policy_version": self.policy_version,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` stood. Raises UserError when a data set has another size or seed."""
        self.prompt_cursor.load_state_dict(state["prompt_cursor"])
        self.expert_cursor.load_state_dict(state["expert_cursor"])
        self.policy_version = state["policy_version"]

    def _needs_rollouts(self, step: int) -> bool:
        return any(mu_at(self.config, s) < 1.0 for s in range(step, step + self.plan.steps_per_rollout))

    def _draw_batch(self, step: int) -> _Batch:
        """Ask for the completions of the next prompts."""
        cursor = self.prompt_cursor.state_dict()
        count = self.plan.prompts_per_step * self.config.grpo.steps_per_generation
        prompts = [self.data.prompts[i] for i in self.prompt_cursor.next(count)]
        num_generations = self.config.rollout.num_generations
        return _Batch(prompts, self._draw(self.sampler, prompts, self._sampling, num_generations, step), cursor)

    def _draw(
        self, sampler: Sampler, prompts: Sequence[Prompt], params: SamplingParams, num_generations: int, step: int
    ) -> Drawing:
        return sampler.draw(
            prompts, params, num_generations=num_generations, step=step, policy_version=self.policy_version
        )

    @timed("reward")
    def _score(self, prompts: Sequence[Prompt], rollouts: Sequence[RolloutSample]) -> ScoredRollouts:
        return score_rollouts(prompts, rollouts, self.tokenizer, self.reward_function)

    @timed("log_probs")
    def _with_log_probs(self, samples: list[TrainingSample], field: str) -> list[TrainingSample]:
        log_probs = self.engine.compute_log_probs(
            samples, micro_batch_size=self.config.train.micro_batch_size, reference=field == "ref_log_probs"
        )
        return [dataclasses.replace(sample, **{field: row}) for sample, row in zip(samples, log_probs)]
