"""The samples of a step as this rank's micro-batches, as the configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chord_megatron.algorithm.aggregation import Mean
from chord_megatron.algorithm.objective import Objective
from chord_megatron.batching.packing import BatchLayout, build_global_batch
from chord_megatron.config import Config
from chord_megatron.types import GlobalBatch, TrainingSample


def pack_all(samples: Sequence[TrainingSample], layout: BatchLayout, config: Config, **settings: Any) -> GlobalBatch:
    """Every sample; `settings` as of build_global_batch."""
    train = config.train
    return build_global_batch(
        samples,
        layout,
        micro_batch_size=train.micro_batch_size,
        max_tokens=train.max_tokens_per_micro_batch,
        shares_prompts=train.share_prompts,
        **settings,
    )


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
    return pack_all(
        samples,
        layout,
        config,
        shuffle_seed=train.seed + step if train.packing_order == "shuffled" else None,
        skips_idle_rows=train.skip_idle_rows and not objective.needs_idle_rows,
        rollout_mean=means[0],
        expert_mean=means[1],
    )
