"""Keeps a rollout engine in step with the policy: new weights before the first token, and a check that they arrived."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch.distributed as dist

from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.batching.samples import probe_samples
from chord_megatron.config import RolloutConfig
from chord_megatron.rollout.consistency import Scores, check_consistency, largest_mean_difference
from chord_megatron.rollout.protocol import AsynchronousEngine, RolloutEngine, ScoringEngine
from chord_megatron.tracking.timers import PhaseTimer
from chord_megatron.types import Prompt, RolloutRequest, RolloutSample, SamplingParams

_NUM_PROBES = 8


def sampling_params(config: RolloutConfig, stop: tuple[int, ...]) -> SamplingParams:
    """Of training's rollouts; `stop`: the tokens that end a completion."""
    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_completion_length=config.max_completion_length,
        stop_token_ids=stop,
    )


def choose_probes(config: RolloutConfig, rollout: RolloutEngine, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """What trainer and sampler both score after an update; none where they share their weights."""
    is_checked = isinstance(rollout, ScoringEngine) and config.consistency_threshold is not None
    return prompts[:_NUM_PROBES] if is_checked else ()


class Drawing:
    """Completions that have been asked for."""

    def __init__(self, collect: Callable[[], list[RolloutSample]]) -> None:
        self._collect = collect
        self._samples: list[RolloutSample] | None = None

    def result(self) -> list[RolloutSample]:
        """Wait for them; the same list on every rank. A collective call."""
        if self._samples is None:
            self._samples = self._collect()
        return self._samples


@dataclass
class Sampler:
    """Every method is a collective call of all ranks."""

    engine: MegatronEngine
    rollout: RolloutEngine
    config: RolloutConfig
    probes: Sequence[Prompt]  # what both sides score after an update; none where they share their weights
    timer: PhaseTimer
    _ahead: Drawing | None = field(default=None, init=False)  # must be done before the weights change

    def draw(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        num_generations: int,
        step: int,
        first_place: int = 0,
    ) -> Drawing:
        """Completions by the policy as it is now; under max_staleness 1 they come while the caller goes on."""
        request = RolloutRequest(prompts, params, num_generations, step, self.engine.policy_version, first_place)
        if not self.config.max_staleness:
            return Drawing(partial(self._draw_now, request))
        assert isinstance(self.rollout, AsynchronousEngine)
        if self._ahead is not None:
            self._ahead.result()
        self._synchronize(request.policy_version)
        self._ahead = Drawing(partial(self._collect, self.rollout.submit(request)))
        return self._ahead

    def _collect(self, collect: Callable[[], list[RolloutSample]]) -> list[RolloutSample]:
        with self.timer("rollout"):
            return collect()

    def _draw_now(self, request: RolloutRequest) -> list[RolloutSample]:
        with self.engine.offloaded(optimizer=self.config.offload_optimizer, model=False):
            self._synchronize(request.policy_version)
            with (
                self.timer("rollout"),
                self.engine.offloaded(optimizer=False, model=self.config.offload_model),
            ):
                return self.rollout.generate(request)

    def _synchronize(self, policy_version: int) -> None:
        """Send the policy's weights, unless the sampler has them, and compare what both make of the probes."""
        if self.rollout.weights_version == policy_version:
            return
        with self.timer("sync"):
            expected = self._probe_log_probs()
            self.rollout.update_weights(self.engine.export_hf_weights, policy_version)
            if expected:
                with self.engine.offloaded(optimizer=False, model=self.config.offload_model):
                    self._check(expected, policy_version)

    def _probe_log_probs(self) -> Scores:
        if not self.probes:
            return []
        samples = probe_samples(self.probes)
        batch = build_global_batch(samples, self.engine.batch_layout, micro_batch_size=len(samples))
        return [row[1:].tolist() for row in self.engine.compute_log_probs(batch)]

    def _check(self, expected: Scores, policy_version: int) -> None:
        assert isinstance(self.rollout, ScoringEngine) and self.config.consistency_threshold is not None
        scores = self.rollout.score([prompt.tokens for prompt in self.probes])
        found: list[tuple[float, str]] = [(0.0, "")] * dist.get_world_size()
        dist.all_gather_object(found, largest_mean_difference(expected, scores))
        difference, name = max(found)
        check_consistency(
            difference,
            name,
            threshold=self.config.consistency_threshold,
            version=policy_version,
            action=self.config.consistency_action,
        )
