"""Rollouts by vLLM servers in other processes: rank 0 talks to them, all ranks get the completions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from chord_megatron.rollout.engine import WeightSource
from chord_megatron.rollout.samples import make_sample
from chord_megatron.rollout.server_pool import ServerPool, UpdateError
from chord_megatron.rollout.vllm_adapter import SCORING_ARGUMENTS, sampling_arguments
from chord_megatron.rollout.weight_transfer import WeightTransfer
from chord_megatron.types import Prompt, RolloutSample, SamplingParams

T = TypeVar("T")

_UPDATE_ATTEMPTS = 2


class ServerRollout:
    """Every method is a collective call of all ranks; `pool` is there on rank 0 alone."""

    def __init__(self, pool: ServerPool | None, transfer: WeightTransfer, *, seed: int) -> None:
        self._pool, self._transfer, self._seed = pool, transfer, seed
        self.weights_version: int | None = None
        self.generation_seconds: float | None = None

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, num_generations: int, step: int, policy_version: int
    ) -> list[RolloutSample]:
        """See RolloutEngine."""
        collect = self.submit(
            prompts, params, num_generations=num_generations, step=step, policy_version=policy_version
        )
        return collect()

    def submit(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, num_generations: int, step: int, policy_version: int
    ) -> Callable[[], list[RolloutSample]]:
        """See AsynchronousEngine."""
        assert self.weights_version == policy_version, "sampling with other weights than the policy's"
        if self._pool is None:
            return lambda: _broadcast([])
        repeated = [prompt for prompt in prompts for _ in range(num_generations)]
        requests = [
            {
                "token_ids": list(prompt.tokens),
                "sampling_params": sampling_arguments(params, (self._seed, step, index)),
            }
            for index, prompt in enumerate(repeated)
        ]
        start = time.perf_counter()
        future = self._pool.submit(requests, policy_version)
        future.add_done_callback(lambda _: self._stop_clock(start))

        def collect() -> list[RolloutSample]:
            return _broadcast(
                [
                    make_sample(prompt, index, choice["token_ids"], _log_probs(choice), params, policy_version)
                    for index, (prompt, choice) in enumerate(zip(repeated, future.result(), strict=True))
                ]
            )

        return collect

    def _stop_clock(self, start: float) -> None:
        self.generation_seconds = time.perf_counter() - start

    def score(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        """See ScoringEngine: those of every server."""
        return self._pool.score(sequences, SCORING_ARGUMENTS) if self._pool else {}

    def update_weights(self, weights: WeightSource, policy_version: int) -> None:
        """See RolloutEngine. Raises UserError where no server takes them, also not after a restart."""
        self.weights_version = None
        for _ in range(_UPDATE_ATTEMPTS):
            failure = _broadcast(self._try_update(weights(), policy_version))
            if failure is None:
                self.weights_version = policy_version
                return
        raise UpdateError(failure)

    def _try_update(self, weights: Iterator[tuple[str, Tensor]], policy_version: int) -> str | None:
        """Why no server took them, if so."""
        failure = None
        if self._pool is not None:
            try:
                self._pool.open_update(policy_version)
                self._transfer.send(self._pool, weights)
                self._pool.close_update()
            except UpdateError as error:
                failure = str(error)
        for _ in weights:  # what is left, or all of them: each is a collective call
            pass
        return failure

    def close(self) -> None:
        """Drop the connections; the servers run on."""
        if self._pool is not None:
            self._pool.close()


def _log_probs(choice: dict[str, Any]) -> list[float]:
    return [entry["logprob"] for entry in choice["logprobs"]["content"]]


def _broadcast(value: T) -> T:
    """Rank 0's value."""
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]
