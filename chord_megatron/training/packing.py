"""The samples of a step as this rank's micro-batches, as the configuration asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from chord_megatron.algorithm.aggregation import Mean
from chord_megatron.algorithm.objective import Objective
from chord_megatron.batching.packing import BatchLayout, build_global_batch
from chord_megatron.config import Config
from chord_megatron.system.errors import UserError
from chord_megatron.types import GlobalBatch, TrainingSample


def pack_all(samples: Sequence[TrainingSample], layout: BatchLayout, config: Config, **settings: Any) -> GlobalBatch:
    """Every sample; `settings` as of build_global_batch. Raises UserError where one is longer than a micro-batch."""
    train = config.train
    lengths = ((_name(sample, place), len(sample.tokens)) for place, sample in enumerate(samples))
    refuse_longer_rows(lengths, train.max_tokens_per_micro_batch)
    return build_global_batch(
        samples,
        layout,
        micro_batch_size=train.micro_batch_size,
        max_tokens=train.max_tokens_per_micro_batch,
        shares_prompts=train.share_prompts,
        **settings,
    )


def pack_learnt(
    samples: Sequence[TrainingSample], layout: BatchLayout, config: Config, objective: Objective, **settings: Any
) -> GlobalBatch:
    """Without idle rows, where these are skipped; otherwise as pack_all."""
    skips_idle_rows = config.train.skip_idle_rows and not objective.needs_idle_rows
    return pack_all(samples, layout, config, skips_idle_rows=skips_idle_rows, **settings)


def pack_step(
    samples: Sequence[TrainingSample],
    layout: BatchLayout,
    config: Config,
    *,
    step: int,
    objective: Objective,
    means: tuple[Mean, Mean],
) -> GlobalBatch:
    """Those that the step learns from. means: of the rollout and of the expert stream."""
    train = config.train
    return pack_learnt(
        samples,
        layout,
        config,
        objective,
        shuffle_seed=train.seed + step if train.packing_order == "shuffled" else None,
        rollout_mean=means[0],
        expert_mean=means[1],
    )


def refuse_longer_rows(lengths: Iterable[tuple[str, int]], budget: int | None) -> None:
    """lengths: (name, tokens) of rows. Raises UserError where one has more tokens than the budget."""
    if budget is None:
        return
    for name, tokens in lengths:
        if tokens > budget:
            raise UserError(
                f"{name} has {tokens} tokens, more than train.max_tokens_per_micro_batch={budget}; set that to at "
                f"least {tokens}, or leave out such rows (chord.chord_sft_max_length, data.max_prompt_length, "
                "rollout.max_completion_length)"
            )


def _name(sample: TrainingSample, place: int) -> str:
    return f"completion {place} of the step" if sample.row is None else expert_name(sample.row)


def expert_name(row: int) -> str:
    """How an expert's row is called in sentences."""
    return f"row {row} of chord.chord_sft_dataset (counted from 0)"
