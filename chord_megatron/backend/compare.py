"""A Megatron checkpoint's model against transformers' of the same weights."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from chord_megatron.backend.groups import ParallelGroups, initialize_distributed, shut_down_distributed
from chord_megatron.backend.megatron_weights import load_megatron_weights
from chord_megatron.backend.model import Targets, build_model_chunks
from chord_megatron.config import ModelConfig, ParallelConfig
from chord_megatron.convert.architecture import ModelArchitecture

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
        return _log_probs(chunks[0].eval(), tokens, groups)
    finally:
        if is_first:
            shut_down_distributed()


def _log_probs(model: torch.nn.Module, tokens: Tensor, groups: ParallelGroups) -> Tensor:
    length = len(tokens)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=groups.device)
    everywhere = torch.ones(length, device=groups.device)
    targets = Targets(tokens.roll(-1).to(groups.device), everywhere, everywhere.bool())
    log_probs, _ = model(
        input_ids=tokens[None].to(groups.device),
        position_ids=torch.arange(length, device=groups.device)[None],
        attention_mask=None,
        labels=targets,
        packed_seq_params=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=length,
            max_seqlen_kv=length,
        ),
    )
    return log_probs[:-1].float().cpu()
