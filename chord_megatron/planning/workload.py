"""How many rows and tokens a step has: the most, which memory is planned for, and the mean, which time goes by."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from chord_megatron.config import Config
from chord_megatron.planning.plan import Plan
from chord_megatron.planning.schedule import mu_range, needs_rollouts


@dataclass(frozen=True)
class Fill:
    """How long rows are on average, as shares of the longest that the configuration allows."""

    prompt: float = 0.5
    completion: float = 0.5
    expert: float = 0.5


@dataclass(frozen=True)
class Workload:
    """One optimizer step."""

    longest_row: int  # tokens
    tokens_per_micro_batch: int  # at most, of all ranks that share a model
    most_micro_batches: int  # of each data-parallel rank, where all rows are as long as they may be
    micro_batches: int  # on average
    completions: int
    expert_rows: int
    prompt_tokens: float  # mean
    completion_tokens: float  # mean
    expert_tokens: float  # mean, prompt and answer

    @property
    def rows(self) -> int:
        """Of both streams."""
        return self.completions + self.expert_rows

    @property
    def rollout_tokens(self) -> float:
        """Of all completions with their prompts."""
        return self.completions * (self.prompt_tokens + self.completion_tokens)

    @property
    def tokens(self) -> float:
        """Of all rows."""
        return self.rollout_tokens + self.expert_rows * self.expert_tokens

    @property
    def counted_tokens(self) -> float:
        """Whose log-probs are computed; of expert rows that is at most all."""
        return self.completions * self.completion_tokens + self.expert_rows * self.expert_tokens

    @property
    def mean_row(self) -> float:
        """Tokens of a row, where every token counts once: what attention between tokens grows with."""
        rollout, expert = self.prompt_tokens + self.completion_tokens, self.expert_tokens
        squares = self.completions * rollout**2 + self.expert_rows * expert**2
        return squares / self.tokens if self.tokens else 0.0


def reads_experts(config: Config) -> bool:
    """Whether a step may have expert rows that are learnt."""
    return config.chord.chord_sft_dataset is not None and mu_range(config)[1] > 0


def longest_row(config: Config, expert_max_length: int) -> int:
    """Tokens, of both streams, as far as a run has them; a row beyond the budget of a micro-batch ends it."""
    rollout = config.data.max_prompt_length + config.rollout.max_completion_length
    longest = max(rollout * needs_rollouts(config), expert_max_length * reads_experts(config))
    return min(longest, config.train.max_tokens_per_micro_batch or longest)


def workload(config: Config, plan: Plan, fill: Fill | None = None) -> Workload:
    """Of a step with both streams, where a run has both."""
    fill = fill or Fill()
    data, rollout = config.data, config.rollout
    completions = plan.completions_per_step if needs_rollouts(config) else 0
    expert_rows = plan.expert_rows_per_step if reads_experts(config) else 0
    longest = longest_row(config, plan.expert_max_length)
    budget, size = config.train.max_tokens_per_micro_batch, config.train.micro_batch_size
    most_rows = budget // longest if budget else size
    load = Workload(
        longest_row=longest,
        tokens_per_micro_batch=budget or size * longest,
        most_micro_batches=_micro_batches(config, plan, completions + expert_rows, most_rows),
        micro_batches=0,
        completions=completions,
        expert_rows=expert_rows,
        prompt_tokens=fill.prompt * data.max_prompt_length,
        completion_tokens=fill.completion * rollout.max_completion_length,
        expert_tokens=fill.expert * min(plan.expert_max_length, longest),
    )
    mean_rows = budget * load.rows / load.tokens if budget else size
    return replace(load, micro_batches=_micro_batches(config, plan, load.rows, mean_rows))


def _micro_batches(config: Config, plan: Plan, rows: int, rows_of_one: float) -> int:
    """As batching/assignment.py counts them; rows_of_one: how many rows one of them has."""
    interleaved = config.parallel.virtual_pipeline_model_parallel_size is not None
    multiple = config.parallel.pipeline_model_parallel_size if interleaved else 1
    rows_of_rank = -(-rows // plan.data_parallel_size)
    return math.ceil(rows_of_rank / (rows_of_one * multiple)) * multiple
