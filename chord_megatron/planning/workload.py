"""How many rows and tokens a step has: the most, which memory is planned for, and the mean, which time goes by."""

from __future__ import annotations

from dataclasses import dataclass

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
    micro_batches: int  # of each data-parallel rank
    completions: int
    expert_rows: int
    prompt_tokens: float  # mean
    completion_tokens: float  # mean
    expert_tokens: float  # mean, prompt and answer

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


def workload(config: Config, plan: Plan, fill: Fill | None = None) -> Workload:
    """Of a step with both streams, where a run has both."""
    fill = fill or Fill()
    data, rollout = config.data, config.rollout
    completions = plan.completions_per_step if needs_rollouts(config) else 0
    expert_rows = plan.expert_rows_per_step if mu_range(config)[1] > 0 else 0
    longest = max(
        data.max_prompt_length + rollout.max_completion_length if completions else 0,
        plan.expert_max_length if expert_rows else 0,
    )
    return Workload(
        longest_row=longest,
        tokens_per_micro_batch=config.train.micro_batch_size * longest,
        micro_batches=_micro_batches(config, plan, completions + expert_rows),
        completions=completions,
        expert_rows=expert_rows,
        prompt_tokens=fill.prompt * data.max_prompt_length,
        completion_tokens=fill.completion * rollout.max_completion_length,
        expert_tokens=fill.expert * plan.expert_max_length,
    )


def _micro_batches(config: Config, plan: Plan, rows: int) -> int:
    """As make_plan counts them, for the streams that there are."""
    interleaved = config.parallel.virtual_pipeline_model_parallel_size is not None
    multiple = config.parallel.pipeline_model_parallel_size if interleaved else 1
    rows_of_rank = -(-rows // plan.data_parallel_size)
    return -(-rows_of_rank // (config.train.micro_batch_size * multiple)) * multiple
