"""Trains with a colocated engine, then writes what the engine holds and says; or the same of a fresh engine.

vllm_colocate_worker.py OUTPUT CONFIG [key=value ...]     under torchrun
vllm_colocate_worker.py OUTPUT --fresh HF_DIR
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chord_megatron.backend.groups import shut_down_distributed
from chord_megatron.config import load_config
from chord_megatron.rollout.vllm_adapter import import_vllm, sampling_arguments
from chord_megatron.training.run import Run
from chord_megatron.types import SamplingParams


def describe(llm: Any) -> dict[str, Any]:
    """Checksums of the weights as the engine keeps them, and a few completions."""
    vllm = import_vllm()
    arguments = [sampling_arguments(SamplingParams(max_completion_length=12), (0, 0, i)) for i in range(4)]
    outputs = llm.generate(
        [{"prompt_token_ids": [5, 6, 7]}] * 4, [vllm.SamplingParams(**one) for one in arguments], use_tqdm=False
    )
    (checksums,) = llm.collective_rpc("compute_weight_checksums")
    return {"checksums": checksums, "tokens": [list(output.outputs[0].token_ids) for output in outputs]}


def trained(arguments: list[str]) -> dict[str, Any]:
    threads, setter = torch.get_num_threads(), torch.set_num_threads
    run = Run(load_config(arguments[0], arguments[1:]))
    before = random.getstate(), torch.get_rng_state().tolist()
    sampler = run.evaluator.sampler
    found: dict[str, Any] = {}

    def describe_before_the_end() -> None:
        sampler._synchronize(run.engine.policy_version)  # the weights after the last step
        found.update(describe(sampler.rollout._llm))

    sampler._synchronize(run.engine.policy_version)
    after = random.getstate(), torch.get_rng_state().tolist()
    run._opened.callback(describe_before_the_end)
    run.train()
    kept = before == after and torch.get_num_threads() == threads and torch.set_num_threads is setter
    return {**found, "settings_kept": kept}


def fresh(model_dir: str) -> dict[str, Any]:
    vllm = import_vllm()
    return describe(
        vllm.LLM(model_dir, dtype="float32", max_model_len=56, enforce_eager=True, logprobs_mode="processed_logprobs")
    )


def main() -> None:
    output, *arguments = sys.argv[1:]
    result = fresh(arguments[1]) if arguments[0] == "--fresh" else trained(arguments)
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(output).write_text(json.dumps(result), encoding="utf-8")
    if arguments[0] != "--fresh":
        shut_down_distributed()


if __name__ == "__main__":
    main()
