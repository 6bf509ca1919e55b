"""What colocated and served engines ask of vLLM's API: its version, arguments, and how a completion is requested."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from chord_megatron.ops.sampling import seed_number
from chord_megatron.system.errors import UserError
from chord_megatron.system.quiet import silence_vllm
from chord_megatron.system.versions import VLLM_DISTRIBUTIONS, VLLM_RANGE, installed_version
from chord_megatron.types import SamplingParams
from chord_megatron.weights.hf_config import read_architecture

WORKER_EXTENSION = "chord_megatron.rollout.serving.vllm_worker.WorkerExtension"


def import_vllm() -> Any:
    """The package, once its version is known to fit. Raises UserError."""
    found = installed_version(*VLLM_DISTRIBUTIONS)
    if found is None:
        raise UserError(
            f"rollout.engine=vllm needs vLLM {VLLM_RANGE}, which is not installed; run `make vllm`, or set "
            "rollout.engine=megatron"
        )
    if not SpecifierSet(VLLM_RANGE).contains(Version(found).base_version):
        raise UserError(f"vLLM {found} is installed, but this release works with {VLLM_RANGE}; run `make vllm`")
    prepare_environment()
    silence_vllm()
    try:
        return import_module("vllm")
    except Exception as error:
        raise UserError(
            f"vLLM {found} cannot be imported ({type(error).__name__}: {error}); `chord-megatron doctor` says more"
        ) from error


def prepare_environment() -> None:
    """Defaults of vLLM's environment variables, for what the user has not set."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it pins threads that the trainer needs, too
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without a GPU its default is a share of all memory
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def engine_arguments(model_dir: Path, *, dtype: str, max_model_len: int, max_num_seqs: int) -> dict[str, Any]:
    """What both kinds of engine are built with. Weights come from the trainer, so none are read."""
    return {
        "model": str(model_dir),
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "load_format": "dummy",
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature; the default ignores it
        "worker_extension_cls": WORKER_EXTENSION,
        # vLLM goes by config.json alone; whether the model is tied is what the weights say.
        "hf_overrides": {"tie_word_embeddings": read_architecture(model_dir).tie_word_embeddings},
        "generation_config": "vllm",  # sampling is what the request says, not what the model's file suggests
    }


def sampling_arguments(params: SamplingParams, seed: Sequence[int]) -> dict[str, Any]:
    """The request of one completion: token ids and the log-prob of each, its random numbers from `seed`."""
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "max_tokens": params.max_completion_length,
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": True,  # stop_token_ids hold the end tokens
        "seed": seed_number(seed),
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }


SCORING_ARGUMENTS = {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
