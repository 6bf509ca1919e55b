"""Rollouts by vLLM servers in other processes: rank 0 talks to them, all ranks get the completions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tenacity import retry, retry_if_exception_type, stop_after_attempt
from torch import Tensor

from chord_megatron.rollout.protocol import WeightSource
from chord_megatron.rollout.samples import Completion, completion, share_samples
from chord_megatron.rollout.servers.pool import ServerPool, UpdateError
from chord_megatron.rollout.servers.transfer import WeightTransfer
from chord_megatron.rollout.vllm_adapter import SCORING_ARGUMENTS, sampling_arguments
from chord_megatron.system.errors import UserError
from chord_megatron.types import RolloutRequest, RolloutSample

T = TypeVar("T")

# What vLLM's server writes for NaN and -inf, which JSON cannot hold (_clamp_logprob in
# entrypoints/scale_out/token_in_token_out/serving.py).
_FLOOR = -9999.0


class ServerRollout:
    """Every method is a collective call of all ranks; `pool` is there on rank 0 alone."""

    def __init__(self, pool: ServerPool | None, transfer: WeightTransfer, device: torch.device, *, seed: int) -> None:
        self._pool, self._transfer, self._device, self._seed = pool, transfer, device, seed
        self.weights_version: int | None = None
        self.generation_seconds: float | None = None

    def generate(self, request: RolloutRequest) -> list[RolloutSample]:
        """See RolloutEngine."""
        return self.submit(request)()

    def submit(self, request: RolloutRequest) -> Callable[[], list[RolloutSample]]:
        """See AsynchronousEngine."""
        assert self.weights_version == request.policy_version, "sampling with other weights than the policy's"
        answers: Future[list[dict[str, Any]]] | None = None
        if self._pool is not None:
            start = time.perf_counter()
            answers = self._pool.submit(self._as_json(request), request.policy_version)
            answers.add_done_callback(lambda _: self._stop_clock(start))
        return partial(self._collect, request, answers)

    def _as_json(self, request: RolloutRequest) -> list[dict[str, Any]]:
        return [
            {
                "token_ids": list(prompt.tokens),
                "sampling_params": sampling_arguments(request.params, request.seed(self._seed, index)),
            }
            for index, prompt in enumerate(request.repeated)
        ]

    def _collect(self, request: RolloutRequest, answers: Future[list[dict[str, Any]]] | None) -> list[RolloutSample]:
        completions: list[Completion] = []

        def wait(pool: ServerPool) -> None:
            assert answers is not None
            choices = pool.wait(answers, len(request.repeated))
            completions.extend(_completion(index, choice) for index, choice in enumerate(choices))

        self._on_rank_0(wait)  # every rank hears of what went wrong before it waits for completions
        return share_samples(request, completions, None, self._device)

    def _stop_clock(self, start: float) -> None:
        self.generation_seconds = time.perf_counter() - start

    def score(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        """See ScoringEngine: those of every server."""
        return self._on_rank_0(lambda pool: pool.score(sequences, SCORING_ARGUMENTS))

    def update_weights(self, weights: WeightSource, policy_version: int) -> None:
        """See RolloutEngine. Raises UserError where no server takes them, also not after a restart."""
        self.weights_version = None
        self._update(weights, policy_version)
        self.weights_version = policy_version

    @retry(retry=retry_if_exception_type(UpdateError), stop=stop_after_attempt(2), reraise=True)
    def _update(self, source: WeightSource, policy_version: int) -> None:
        weights = source()

        def send(pool: ServerPool) -> None:
            try:
                pool.open_update(policy_version)
                self._transfer.send(pool, weights)
                pool.close_update()
            finally:
                _exhaust(weights)

        if self._pool is None:
            _exhaust(weights)
        self._on_rank_0(send)

    def close(self) -> None:
        """Drop the connections; the servers run on."""
        if self._pool is not None:
            self._pool.close()

    def _on_rank_0(self, compute: Callable[[ServerPool], T]) -> T:
        """What rank 0 computes, on every rank; what it raises for the user, every rank raises."""
        outcome: list[Any] = [None]
        if self._pool is not None:
            try:
                outcome = [compute(self._pool)]
            except UserError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]


def _completion(index: int, choice: dict[str, Any]) -> Completion:
    return completion(
        index, choice["token_ids"], [_log_prob(entry["logprob"]) for entry in choice["logprobs"]["content"]]
    )


def _log_prob(value: float | None) -> float:
    """What a server sent, NaN where it had no finite number."""
    return math.nan if value is None or value <= _FLOOR else value


def _exhaust(weights: Iterator[tuple[str, Tensor]]) -> None:
    """Take part in what is left of a collective pass."""
    for _ in weights:
        pass
