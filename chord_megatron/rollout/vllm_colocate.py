"""Rollouts by vLLM inside the trainer's processes: one engine for each group of `tensor_parallel_size` ranks."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from chord_megatron.rollout.protocol import WeightSource
from chord_megatron.rollout.samples import Completion, completion, share_samples
from chord_megatron.rollout.updates.manifest import Manifest
from chord_megatron.rollout.vllm_adapter import SCORING_ARGUMENTS, engine_arguments, import_vllm, sampling_arguments
from chord_megatron.types import RolloutRequest, RolloutSample
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.mapping import hf_tensors


class VllmColocateRollout:
    """vLLM under its external launcher. Between generations it may sleep: level 1 keeps the weights on the host, 2 not.

    Every method is a collective call of all ranks.
    """

    generation_seconds: float | None = None

    def __init__(
        self,
        model_dir: Path,
        arch: ModelArchitecture,
        *,
        device: torch.device,
        dtype: str,
        seed: int,
        tensor_parallel_size: int,
        max_model_len: int,
        max_num_seqs: int,
        gpu_memory_utilization: float,
        enforce_eager: bool,
        sleep_level: int,
    ) -> None:
        """Raises UserError where vLLM is absent or of another version."""
        vllm = import_vllm()
        for name in ("RANK", "LOCAL_RANK"):  # vLLM reads torchrun's; without torchrun there is one process
            os.environ.setdefault(name, "0")
        self._request = vllm.SamplingParams
        self._arch, self._dtype, self._seed = arch, getattr(torch, dtype), seed
        self._device = device
        self._sleep_level = sleep_level if torch.cuda.is_available() else 0  # vLLM has no sleep on CPU
        self._asleep: set[str] = set()
        self._num_engines = dist.get_world_size() // tensor_parallel_size
        self._engine_rank = dist.get_rank() // tensor_parallel_size
        self._is_first = dist.get_rank() % tensor_parallel_size == 0
        self.weights_version: int | None = None
        with _kept_settings():
            self._llm = vllm.LLM(
                **engine_arguments(model_dir, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs),
                distributed_executor_backend="external_launcher",
                tensor_parallel_size=tensor_parallel_size,
                gpu_memory_utilization=gpu_memory_utilization,
                enforce_eager=enforce_eager or not torch.cuda.is_available(),
                enable_sleep_mode=self._sleep_level > 0,
                skip_tokenizer_init=True,
                seed=seed,
            )
        self._sleep()

    def generate(self, request: RolloutRequest) -> list[RolloutSample]:
        """See RolloutEngine."""
        assert self.weights_version == request.policy_version, "sampling with other weights than the policy's"
        repeated = request.repeated
        mine = range(self._engine_rank, len(repeated), self._num_engines)
        outputs = self._complete(
            [repeated[i].tokens for i in mine],
            [sampling_arguments(request.params, request.seed(self._seed, i)) for i in mine],
        )
        self._sleep()
        completions = [_completion(i, output.outputs[0]) for i, output in zip(mine, outputs) if self._is_first]
        return share_samples(request, completions, None, self._device)

    def score(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        """See ScoringEngine: those of this rank's engine."""
        outputs = self._complete(sequences, [SCORING_ARGUMENTS] * len(sequences))
        scores = [
            [entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:])]
            for tokens, output in zip(sequences, outputs, strict=True)
        ]
        return {f"vLLM on rank {dist.get_rank()}": scores}

    def update_weights(self, weights: WeightSource, policy_version: int) -> None:
        """See RolloutEngine. Every tensor is loaded as it is exported."""
        self.weights_version = None
        with _kept_settings():
            self._wake("weights")
            manifest = Manifest(hf_tensors(self._arch, self._dtype))
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": manifest.checked(weights())})
            manifest.check_complete()
            self._llm.reset_prefix_cache()
        self.weights_version = policy_version

    def close(self) -> None:
        """Release everything."""
        del self._llm

    def _complete(self, prompts: Sequence[Sequence[int]], arguments: Sequence[dict[str, Any]]) -> list[Any]:
        if not prompts:
            return []
        with _kept_settings():
            self._wake("weights", "kv_cache")
            return self._llm.generate(
                [{"prompt_token_ids": list(tokens)} for tokens in prompts],
                [self._request(**request) for request in arguments],
                use_tqdm=False,
            )

    def _sleep(self) -> None:
        if self._sleep_level:
            with _kept_settings():
                self._llm.sleep(level=self._sleep_level)
            self._asleep = {"weights", "kv_cache"}
        if self._sleep_level == 2:
            self.weights_version = None  # dropped: the next generation wants new ones

    def _wake(self, *tags: str) -> None:
        if due := [tag for tag in tags if tag in self._asleep]:
            self._llm.wake_up(tags=due)
            self._asleep -= {*due}


def _completion(index: int, drawn: Any) -> Completion:
    log_probs = [entry[token].logprob for token, entry in zip(drawn.token_ids, drawn.logprobs, strict=True)]
    return completion(index, drawn.token_ids, log_probs)


@contextmanager
def _kept_settings() -> Iterator[None]:
    """Undo what vLLM changes in its process: random states, the number of threads, and torch's setter for them."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    set_num_threads, num_threads, dtype = torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        torch.set_default_dtype(dtype)
