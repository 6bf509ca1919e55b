"""Rollouts with the training weights themselves: no second copy, nothing to synchronise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist

from chord_megatron.rollout.protocol import WeightSource
from chord_megatron.rollout.samples import make_sample
from chord_megatron.types import Prompt, RolloutSample, SamplingParams


class Generator(Protocol):
    """The part of MegatronEngine that decodes on one data-parallel rank."""

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[tuple[list[int], list[float]]]: ...


class MegatronRollout:
    """Splits the completions of a step over the data-parallel ranks and decodes them in batches."""

    generation_seconds: float | None = None

    def __init__(self, engine: Generator, dp_group: dist.ProcessGroup, *, seed: int, max_batch_size: int) -> None:
        self._engine = engine
        self._dp_group = dp_group
        self._seed = seed
        self._max_batch_size = max_batch_size
        self.weights_version: int | None = None

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, num_generations: int, step: int, policy_version: int
    ) -> list[RolloutSample]:
        """See RolloutEngine."""
        repeated = [prompt for prompt in prompts for _ in range(num_generations)]
        mine = range(self._dp_group.rank(), len(repeated), self._dp_group.size())
        samples = []
        # All ranks call equally often: with experts on other ranks a call is a collective of the replicas.
        largest_share = -(-len(repeated) // self._dp_group.size())
        for start in range(0, largest_share, self._max_batch_size):
            indices = mine[start : start + self._max_batch_size]
            outputs = self._engine.generate(
                [repeated[i].tokens for i in indices], [(self._seed, step, i) for i in indices], params
            )
            samples += [
                make_sample(repeated[i], i, tokens, log_probs, params, policy_version)
                for i, (tokens, log_probs) in zip(indices, outputs)
            ]
        shares: list[list[RolloutSample]] = [[]] * self._dp_group.size()
        dist.all_gather_object(shares, samples, group=self._dp_group)
        return sorted((sample for share in shares for sample in share), key=lambda sample: sample.sample_index)

    def update_weights(self, weights: WeightSource, policy_version: int) -> None:
        """Nothing to do: the trainer's weights are the sampler's."""
        self.weights_version = policy_version

    def close(self) -> None:
        """Nothing to do."""
