"""Rollouts with the training weights themselves: no second copy, nothing to synchronise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from chord_megatron.rollout.protocol import WeightSource
from chord_megatron.rollout.recorded_routing import RoutingForm
from chord_megatron.rollout.samples import Completion, share_samples
from chord_megatron.system.work import Work
from chord_megatron.types import RolloutRequest, RolloutSample, SamplingParams


class Generator(Protocol):
    """The part of MegatronEngine that decodes on one replica of the model."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        record_routing: bool = False,
        tell: Callable[[int], None] = ...,
    ) -> list[tuple[Tensor, ...]]: ...


class EmbeddedRollout:
    """Splits the completions of a step over the replicas of the model and decodes them in batches.

    replicas: a rank of each, data-parallel and context-parallel ones: a sequence is decoded by one of them.
    """

    generation_seconds: float | None = None

    def __init__(
        self,
        engine: Generator,
        replicas: dist.ProcessGroup,
        device: torch.device,
        *,
        seed: int,
        max_batch_size: int,
        routing: RoutingForm | None = None,
        work: Work | None = None,
    ) -> None:
        """routing: where completions are to say which experts served them; work: how many of this rank have ended."""
        self._engine = engine
        self._replicas, self._device = replicas, device
        self._seed = seed
        self._max_batch_size = max_batch_size
        self._routing, self._work = routing, work or Work()
        self.weights_version: int | None = None

    def generate(self, request: RolloutRequest) -> list[RolloutSample]:
        """See RolloutEngine."""
        repeated, rank, size = request.repeated, self._replicas.rank(), self._replicas.size()
        # Side by side, so that the completions of a prompt stay together and the engine reads it once.
        mine = range(len(repeated) * rank // size, len(repeated) * (rank + 1) // size)
        completions: list[Completion] = []
        # All ranks call equally often: with experts on other ranks a call is a collective of the replicas.
        largest_share = -(-len(repeated) // size)
        self._work.begin("completions of this rank" if size > 1 else "completions", len(mine))
        for start in range(0, largest_share, self._max_batch_size):
            indices = mine[start : start + self._max_batch_size]
            outputs = self._engine.generate(
                [repeated[i].tokens for i in indices],
                [request.seed(self._seed, i) for i in indices],
                request.params,
                record_routing=self._routing is not None,
                tell=partial(self._tell, len(completions)),
            )
            completions += [Completion(i, *output) for i, output in zip(indices, outputs)]
        return share_samples(request, completions, self._replicas, self._device, routing=self._routing)

    def _tell(self, before: int, ended: int) -> None:
        self._work.done = before + ended

    def update_weights(self, weights: WeightSource, policy_version: int) -> None:
        """Nothing to do: the trainer's weights are the sampler's."""
        self.weights_version = policy_version

    def close(self) -> None:
        """Nothing to do."""
