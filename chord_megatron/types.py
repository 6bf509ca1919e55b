"""The data that flows through one training step, in the order of the step.

Prompt -> RolloutSample -> TrainingSample -> MicroBatch -> GlobalBatch. Every class is frozen; every
tensor names its shape. Position `t` of a per-token tensor always speaks of the token at position `t`;
only `MicroBatch` is shifted, because there position `t` predicts the token at `t + 1`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]
Metrics = Mapping[str, float | int | None]  # a line of metrics.jsonl or a part of one; None: nothing to measure
LIVE = -1  # in place of an expert's number: the router chooses, as it is in that pass


def foreign_tokens(tokens: Sequence[int], vocab_size: int) -> list[int]:
    """The ids that a model of `vocab_size` rows has no row for."""
    if not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size):  # the quick answer, which is almost always right
        return []
    return [token for token in tokens if not 0 <= token < vocab_size]


@dataclass(frozen=True)
class Prompt:
    """A question with a checkable answer."""

    id: int  # row number in the data set, counted through its sources
    text: str  # what the model reads, after the chat template
    tokens: tuple[int, ...]
    reference: str  # what the reward functions compare with
    columns: dict[str, Any] = field(default_factory=dict)  # the row's, but the prompt's own, for reward functions
    prefill: str = ""  # the part of `text` that belongs to the model's turn; rewards see it in front of a completion
    source: str = ""  # where the row is from, where the data set has several sources


@dataclass(frozen=True)
class ExpertSample:
    """A prompt with a worked expert answer."""

    id: int
    tokens: tuple[int, ...]  # prompt + answer + end-of-turn token
    prompt_length: int
    token_weights: tuple[float, ...] | None = None  # of each token, the data's own; 0: not learnt. None: 1 each


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. `temperature` 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    max_completion_length: int = 256
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class RolloutRequest:
    """The completions of one generation batch, asked for: `num_generations` of each prompt, side by side.

    What is drawn depends on the weights, the prompts, `step` and the completion's place, not on the parallel layout.
    """

    prompts: Sequence[Prompt]
    params: SamplingParams
    num_generations: int
    step: int
    policy_version: int  # optimizer steps taken by the weights that are to sample
    first_place: int = 0  # of the first completion in the batch, where this is a part of one

    def seed(self, run_seed: int, index: int) -> tuple[int, int, int]:
        """What the random numbers of completion `index` of the request are drawn from."""
        return run_seed, self.step, self.first_place + index

    @property
    def repeated(self) -> list[Prompt]:
        """The prompt of each completion."""
        return [prompt for prompt in self.prompts for _ in range(self.num_generations)]


@dataclass(frozen=True, eq=False)
class RolloutSample:
    """One completion of one prompt. Tensors on the host, [length] each."""

    prompt_id: int
    sample_index: int  # position in the generation batch: prompt number * num_generations + k
    tokens: Tensor  # int32: prompt + completion, with the sampled end token
    response_mask: Tensor  # bool, True on the completion
    rollout_log_probs: Tensor  # float32, of the sampler, at its temperature; 0 outside the mask
    policy_version: int  # optimizer steps taken by the weights that sampled it
    finish_reason: FinishReason
    routing: Tensor | None = None  # [length, layers with experts, top k] int16, of the sampler; LIVE where it has none

    @property
    def response_tokens(self) -> list[int]:
        return self.tokens[self.response_mask].tolist()


@dataclass(frozen=True, eq=False)
class ScoredRollouts:
    """The completions of one generation batch with their rewards, prompt groups side by side."""

    prompts: tuple[Prompt, ...]  # of each completion
    rollouts: tuple[RolloutSample, ...]
    rewards: tuple[float, ...]  # NaN: unscorable, left out of everything that is learnt
    rewards_by_function: dict[str, tuple[float, ...]]  # without their weights; NaN: it gave none
    reward_errors: tuple[int, ...]  # built-in functions that failed on the completion, which has their reward 0

    def slice(self, start: int, stop: int) -> ScoredRollouts:
        """The completions [start, stop)."""
        return ScoredRollouts(
            self.prompts[start:stop],
            self.rollouts[start:stop],
            self.rewards[start:stop],
            {name: values[start:stop] for name, values in self.rewards_by_function.items()},
            self.reward_errors[start:stop],
        )


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """A sequence with per-token loss weights: rollout and expert samples are the same kind of thing."""

    tokens: Tensor  # [length] integers
    loss_mask: Tensor  # [length] bool, True on tokens whose log-prob enters the loss
    is_expert: bool
    temperature: float
    advantage: float | Tensor = 0.0  # of the completion, or [length] of each token
    rollout_log_probs: Tensor | None = None  # [length] float32
    old_log_probs: Tensor | None = None  # [length] float32, None when on-policy
    ref_log_probs: Tensor | None = None  # [length] float32, None when beta = 0
    token_weights: float | Tensor = 1.0  # or [length]; they do not enter the denominator
    row: int | None = None  # number in its data set, of an expert's
    routing: Tensor | None = None  # [length, layers with experts, top k] int16: the experts of its update, or LIVE

    @property
    def num_loss_tokens(self) -> int:
        """Tokens whose log-prob enters the loss; the first one has none."""
        return int(self.loss_mask[1:].sum())


class Segment(NamedTuple):
    """A stretch of tokens that attend to one another causally, and to all of a prompt that stands elsewhere."""

    start: int
    length: int
    prompt_start: int = 0
    prompt_length: int = 0


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Packed sequences, `[tokens]` each; position t holds what concerns the prediction of token t + 1.

    Where sequences share prompts (`token_of`), what the model reads (`input_ids`, `position_ids`, `is_token`,
    `routing`) is shorter; all the rest has a row for each token of each sequence even so. Under context parallelism it
    is a rank's share of the sequences (`batching/context_parallel.py`), and all fields speak of that.
    """

    input_ids: Tensor  # int64
    position_ids: Tensor  # int64, restarts at 0 in each sequence
    is_token: Tensor  # bool, of `input_ids`: False at padding
    labels: Tensor  # int64, the next token of the same sequence; 0 where there is none
    cu_seqlens: Tensor  # [num_sequences + 1] int32, padding of the whole is a sequence of its own
    rollout_mask: Tensor  # bool, the tokens R of the objective; a weight or an advantage may be 0 inside it
    expert_mask: Tensor  # bool, the tokens E of the objective
    rollout_weights: Tensor  # float32, a_t of the objective; 0 outside the rollout tokens
    expert_weights: Tensor  # float32, b_t of the objective; 0 outside the expert tokens
    advantages: Tensor  # float32
    temperatures: Tensor  # float32
    rollout_log_probs: Tensor  # float32
    old_log_probs: Tensor | None  # float32
    ref_log_probs: Tensor | None  # float32
    num_tokens: int  # without padding
    max_seqlen: int  # of the longest sequence, padding included
    sample_indices: tuple[int, ...]  # which samples of the batch these sequences are, in packing order
    token_of: Tensor | None = None  # int64, [rows]: the token of `input_ids` that predicts the row; None: the same
    segments: tuple[Segment, ...] | None = None  # of `input_ids`, in order; None: those of cu_seqlens
    # [tokens, layers with experts, top k] int16: the experts of the token at the position itself, or LIVE
    routing: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """[tokens] bool: positions whose log-prob enters the objective; nobody needs the others'."""
        return self.rollout_mask | self.expert_mask

    @property
    def positions(self) -> Tensor:
        """[tokens] where in its sequence each row is."""
        return self.position_ids if self.token_of is None else self.position_ids[self.token_of]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """What one data-parallel rank runs in one optimizer step, with the counts of all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    num_rollout_tokens: int  # R of the objective, over all ranks
    num_expert_tokens: int  # E of the objective, over all ranks
    num_tokens: int  # every non-padding token that is run in the step, over all ranks
    lengths: tuple[int, ...]  # of every sample of the step, over all ranks
    num_run_rollout_tokens: int  # those of R in rows that are run
    num_idle_rows: int  # samples that are not run, over all ranks
    imbalance: float  # largest over mean cost of the data-parallel ranks


class LossResult(NamedTuple):
    """What a loss function makes of one micro-batch. Every micro-batch has the same names."""

    loss: Tensor  # scalar with gradient
    sums: dict[str, Tensor]  # float64 scalars, added over micro-batches and ranks
    maxima: dict[str, Tensor]  # float64 scalars, of which the largest of all micro-batches and ranks is kept
    # [sequences] float64, of each sequence of the micro-batch, added over ranks that share it; padding's are not read.
    rows: dict[str, Tensor]


class LossTotals(NamedTuple):
    """The sums and maxima of a step by name, and what it says of each of its samples; the same on every rank."""

    sums: dict[str, float]
    maxima: dict[str, float]
    rows: dict[str, list[float]]  # by name, in the order of the step's samples
    log_probs: list[Tensor] | None = None  # [length] of each sample's tokens, where they are asked for


class RoutingCounts(NamedTuple):
    """What the routers of all layers and ranks did with the tokens of a step."""

    load: Tensor  # [layers with experts, experts] int64: tokens that each expert served
    replayed: int  # choices of an expert that were replayed
    differing: int  # of these, what the router itself would not have chosen


class GradientComparison(NamedTuple):
    """Two losses' gradients at the same weights; NaN where one is not finite."""

    norm_a: float  # L2
    norm_b: float
    cosine: float  # NaN also where a gradient is 0
