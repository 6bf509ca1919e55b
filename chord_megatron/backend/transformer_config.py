"""Megatron-Core's configuration of an architecture under a parallel layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from chord_megatron.backend.acceleration import Acceleration
from chord_megatron.backend.transformer_options import checked_options, refusals_named
from chord_megatron.config import ModelConfig, ParallelConfig
from chord_megatron.planning.pipeline import stage_layers
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture, YarnRope

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(
    arch: ModelArchitecture, model: ModelConfig, parallel: ParallelConfig, acceleration: Acceleration
) -> TransformerConfig:
    """Megatron-Core's configuration of this architecture under this layout, with the user's fields passed through.

    Raises UserError where those, by themselves or with the rest, are not what Megatron-Core takes.
    """
    config_class = TransformerConfig if arch.mla is None else MLATransformerConfig
    options = checked_options(model.transformer_config, config_class, transformer_impl=acceleration.transformer_impl)
    if options.get("gradient_accumulation_fusion") and not acceleration.fuse_gradient_accumulation:
        raise UserError(
            "model.transformer_config.gradient_accumulation_fusion=true needs a GPU and Apex's kernel for it, which "
            "this machine lacks; remove it: where both are there, it is on"
        )
    with refusals_named(model):
        return _build(config_class, {**_defaults(acceleration), **options}, arch, model, parallel, acceleration)


def _build(
    config_class: type[TransformerConfig],
    options: dict[str, Any],
    arch: ModelArchitecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    acceleration: Acceleration,
) -> TransformerConfig:
    dtype = _DTYPES[model.dtype]
    return config_class(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Every value is read from the checkpoint, but only initialisation marks a parameter as tensor-parallel
        # (_initialize_affine_weight_cpu, _gpu); unmarked ones count once in the gradient norm instead of once per rank.
        perform_initialization=True,
        init_method=torch.nn.init.zeros_,
        output_layer_init_method=torch.nn.init.zeros_,
        calculate_per_token_loss=True,  # sums over tokens, divided once by the global count
        variable_seq_lengths=True,  # packed micro-batches differ in length
        transformer_impl=acceleration.transformer_impl,
        finalize_model_grads_func=finalize_model_grads,
        **_layout(parallel, arch),
        **(_attention(arch) if arch.mla is None else _latent_attention(arch)),
        **_experts(arch, grouped_gemm=acceleration.transformer_impl == "transformer_engine"),
        **_recomputation(model),
        **options,
    )


def _defaults(acceleration: Acceleration) -> dict[str, Any]:
    """What a user may choose otherwise."""
    return {
        "moe_token_dispatcher_type": "alltoall",  # the default refuses variable lengths, also without experts
        # Close scores choose different experts in bfloat16, and transformers takes them in float32 as well.
        "moe_router_dtype": "fp32",
        # These fusions need Apex or TransformerEngine kernels.
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": acceleration.fuse_gradient_accumulation,
    }


def _layout(parallel: ParallelConfig, arch: ModelArchitecture) -> dict[str, Any]:
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "pipeline_model_parallel_layout": _pipeline_layout(parallel, arch),
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": 1,  # see groups.py
        # Without other ranks there is nothing to scatter to.
        "sequence_parallel": parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        # Batched sends mix up messages when the previous and the next stage are one peer (PP 2 with VPP).
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _pipeline_layout(parallel: ParallelConfig, arch: ModelArchitecture) -> list[list[str]] | None:
    """What each virtual stage holds, in the order of the layers: how Megatron-Core takes any cut."""
    if parallel.pipeline_model_parallel_size == 1:
        return None
    stages = [["decoder"] * layers for layers in stage_layers(parallel, arch)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _attention(arch: ModelArchitecture) -> dict[str, Any]:
    return {
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "qk_layernorm": arch.qk_layernorm,
        "add_qkv_bias": arch.qkv_bias,
    }


def _latent_attention(arch: ModelArchitecture) -> dict[str, Any]:
    mla, rope = arch.mla, arch.rope_scaling
    assert mla is not None
    settings = {
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "qk_layernorm": True,  # the norms of the latents
        "rotary_base": arch.rope_theta,
    }
    if not isinstance(rope, YarnRope):
        # The factor, 40 by default, enters the softmax scale under either type (MultiLatentAttention).
        return {**settings, "rope_type": "rope", "rotary_scaling_factor": 1.0}
    return {
        **settings,
        "rope_type": "yarn",
        "rotary_scaling_factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }


def _experts(arch: ModelArchitecture, *, grouped_gemm: bool) -> dict[str, Any]:
    moe = arch.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        # Not a list where all layers have experts: with one, checkpoints that store them together cannot be read.
        "moe_layer_freq": [int(arch.is_moe_layer(layer)) for layer in range(arch.num_layers)]
        if moe.dense_layers
        else 1,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "moe_router_topk": moe.experts_per_token,
        "moe_router_score_function": moe.score_function,
        # A softmax over the chosen logits is the softmax over all of them, divided by its sum over the chosen.
        "moe_router_pre_softmax": not moe.normalize_top_k,
        "moe_router_num_groups": moe.num_groups,
        "moe_router_group_topk": moe.top_k_groups,
        "moe_router_topk_scaling_factor": moe.routed_scaling_factor,
        # A trained router: an auxiliary loss would pull it away from what the objective asks for, and its value
        # depends on how tokens are cut into micro-batches. The bias moves by its update rate alone.
        "moe_router_load_balancing_type": "none",
        "moe_router_enable_expert_bias": moe.has_expert_bias,
        "moe_router_bias_update_rate": 0.0,
        "moe_grouped_gemm": grouped_gemm,
    }


def _recomputation(model: ModelConfig) -> dict[str, Any]:
    if not model.recompute:
        return {}
    if isinstance(model.recompute, list):
        return {"recompute_granularity": "selective", "recompute_modules": list(model.recompute)}
    return {
        "recompute_granularity": "full",
        "recompute_method": model.recompute_method or "uniform",
        "recompute_num_layers": model.recompute_num_layers or 1,
    }
