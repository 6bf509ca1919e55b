"""A Megatron checkpoint's model against transformers' of the same weights."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from chord_megatron.backend.groups import initialize_distributed, shut_down_distributed
from chord_megatron.backend.megatron_weights import load_megatron_weights
from chord_megatron.backend.model import build_model_chunks, run_micro_batch
from chord_megatron.batching.packing import BatchLayout, build_global_batch
from chord_megatron.config import ModelConfig, ParallelConfig
from chord_megatron.types import TrainingSample
from chord_megatron.weights.architecture import ModelArchitecture

_LENGTH = 16


@torch.no_grad()
def max_log_prob_difference(megatron_dir: Path, hf_dir: Path, arch: ModelArchitecture) -> float | None:
    """Largest difference between the log-probs of random tokens, in float32; one model is in memory at a time.

    None where those of transformers are not finite.
    """
    length = min(_LENGTH, arch.max_position_embeddings)
    tokens = torch.randint(arch.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    expected = _hf_log_probs(hf_dir, tokens)
    if not expected.isfinite().all():
        return None
    actual = _megatron_log_probs(megatron_dir, arch, tokens)
    return float((actual - expected).abs().max())


def _hf_log_probs(directory: Path, tokens: Tensor) -> Tensor:
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    log_probs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(-1, tokens[1:, None])[:, 0]


def _megatron_log_probs(directory: Path, arch: ModelArchitecture, tokens: Tensor) -> Tensor:
    is_first = not dist.is_initialized()
    parallel = ParallelConfig()
    groups = initialize_distributed(parallel, seed=0)
    try:
        chunks = build_model_chunks(arch, ModelConfig(path=str(directory), dtype="float32"), parallel, groups)
        load_megatron_weights(chunks, directory, arch)
        sample = TrainingSample(tokens, torch.ones_like(tokens, dtype=torch.bool), is_expert=True, temperature=1.0)
        batch = build_global_batch([sample], BatchLayout(), micro_batch_size=1)
        micro_batch = batch.micro_batches[0].to(groups.device)
        log_probs, _ = run_micro_batch(chunks[0].eval(), micro_batch, compute_entropy=False)
        return log_probs[:-1].float().cpu()
    finally:
        if is_first:
            shut_down_distributed()
