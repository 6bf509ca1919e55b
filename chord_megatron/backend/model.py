"""Builds the GPTModel of an architecture: layer spec, norm, head with vocab-parallel log-probs, DDP."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from chord_megatron.backend.attention import CachedSelfAttention, SDPACoreAttention, cached_attention
from chord_megatron.backend.groups import ParallelGroups
from chord_megatron.config import ModelConfig, ParallelConfig
from chord_megatron.convert.architecture import ModelArchitecture
from chord_megatron.ops.vocab_parallel import vocab_parallel_log_probs

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_VOCAB_MULTIPLE = 128  # Megatron-LM's --make-vocab-size-divisible-by


@dataclass(frozen=True)
class Targets:
    """What the head of the last stage needs to turn hidden states into log-probs, [tokens] each.

    Passed as the model's `labels`, which Megatron-Core hands through unread.
    """

    tokens: Tensor
    temperatures: Tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked for sequence parallelism, which WrappedTorchNorm refuses (torch_norm.py:32)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


class CausalLM(GPTModel):
    """GPTModel that returns (log_probs, entropy) of its Targets, [tokens] each; without Targets, logits."""

    real_vocab_size: int  # without the padding columns

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Targets | None = None, **kwargs: Any) -> Any:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=None, **kwargs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden_states, weight=weight)
        return vocab_parallel_log_probs(
            logits.squeeze(1),
            labels.tokens,
            labels.temperatures,
            vocab_size=self.real_vocab_size,
            tp_group=self.pg_collection.tp,
        )


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The vocabulary rounded up so that it splits over TP; the same for every TP size that divides 128."""
    multiple = _VOCAB_MULTIPLE if _VOCAB_MULTIPLE % tp_size == 0 else _VOCAB_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple


def has_transformer_engine() -> bool:
    """Whether the TransformerEngine layers are used: they need a GPU and the package."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def transformer_config(arch: ModelArchitecture, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Megatron-Core's configuration of this architecture under this layout."""
    dtype = _DTYPES[model.dtype]
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        qk_layernorm=arch.qk_layernorm,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        # Without other ranks there is nothing to scatter to.
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Every value is read from the checkpoint, but only initialisation marks a parameter as tensor-parallel
        # (layers.py:170); unmarked ones count once in the gradient norm instead of once a rank.
        perform_initialization=True,
        init_method=torch.nn.init.zeros_,
        output_layer_init_method=torch.nn.init.zeros_,
        calculate_per_token_loss=True,  # sums over tokens, divided once by the global count
        variable_seq_lengths=True,  # packed micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths, also without experts
        # Batched sends mix up messages when the previous and the next stage are one peer (PP 2 with VPP).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # These fusions need Apex or TransformerEngine kernels.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
        **(recompute if model.recompute else {}),
    )


def build_model_chunks(
    arch: ModelArchitecture, model: ModelConfig, parallel: ParallelConfig, groups: ParallelGroups
) -> list[torch.nn.Module]:
    """This rank's model chunks (one per virtual pipeline stage) on its device, weights not yet set."""
    config = transformer_config(arch, model, parallel)
    vp_size = parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(vp_size or 1):
        stage = vp_stage if vp_size else None
        chunk = CausalLM(
            config=config,
            transformer_layer_spec=_block_spec(config, stage),
            vocab_size=padded_vocab_size(arch.vocab_size, groups.tp_size),
            max_sequence_length=arch.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.rope_theta,
            vp_stage=stage,
        ).to(groups.device)
        chunk.real_vocab_size = arch.vocab_size
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def wrap_data_parallel(
    chunks: list[torch.nn.Module], *, use_distributed_optimizer: bool
) -> list[DistributedDataParallel]:
    """DDP around each chunk: gradients accumulate in fp32 and are summed over the data-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=use_distributed_optimizer
    )
    return [
        DistributedDataParallel(unwrap(chunk).config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def unwrap(chunk: torch.nn.Module) -> CausalLM:
    """The CausalLM inside DDP and Float16Module."""
    while not isinstance(chunk, CausalLM):
        chunk = chunk.module
    return chunk


def _block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    layer = _te_layer_spec(config) if has_transformer_engine() else _local_layer_spec(config)
    num_layers = get_num_layers_to_build(config, vp_stage, parallel_state.get_pipeline_model_parallel_rank())
    final_norm = _te_norm() if has_transformer_engine() else RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)


def _local_layer_spec(config: TransformerConfig) -> Any:
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention
    attention.module = CachedSelfAttention
    attention.submodules.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.submodules.q_layernorm = RMSNorm
        attention.submodules.k_layernorm = RMSNorm
    return spec


def _te_layer_spec(config: TransformerConfig) -> Any:
    """TransformerEngine layers, with its varlen attention for training and SDPA over the KV cache."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class TECoreAttention(TEDotProductAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Tensor:
            if kwargs.get("packed_seq_params") is None:
                return cached_attention(query, key, value, attention_mask)
            return super().forward(query, key, value, attention_mask, **kwargs)

    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    attention = spec.submodules.self_attention
    attention.module = CachedSelfAttention
    attention.submodules.core_attention = TECoreAttention
    # What TransformerEngine wants for packed (thd) sequences.
    attention.params = {**attention.params, "attn_mask_type": AttnMaskType.padding_causal}
    return spec


def _te_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
