"""Which modules a layer is made of: Megatron-Core's own on any device, TransformerEngine's where it is there."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from chord_megatron.backend.attention import (
    CachedLatentAttention,
    CachedSelfAttention,
    LocalLatentAttention,
    SDPACoreAttention,
    cached_attention,
    mark_sequence_parallel,
)
from chord_megatron.backend.context_attention import ContextCoreAttention


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked for sequence parallelism, which WrappedTorchNorm refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        mark_sequence_parallel(self.weight, config)


def block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one model chunk of this pipeline rank."""
    on_te = config.transformer_impl == "transformer_engine"
    layer_spec = _te_layer_spec if on_te else _local_layer_spec
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    first = get_transformer_layer_offset(config, vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage, pp_rank))
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config, is_moe=_is_moe_layer(config, layer)) for layer in layers],
        layer_norm=_te_norm() if on_te else RMSNorm,
    )


def _is_moe_layer(config: TransformerConfig, layer: int) -> bool:
    if config.num_moe_experts is None or config.moe_layer_freq == 1:
        return config.num_moe_experts is not None
    return bool(config.moe_layer_freq[layer])


def _local_layer_spec(config: TransformerConfig, *, is_moe: bool) -> Any:
    is_latent = config.multi_latent_attention
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=is_latent,
        normalization="RMSNorm",
    )
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.sharded_state_dict_keys_map = _te_checkpoint_keys(is_latent=is_latent, is_moe=is_moe)
    attention = spec.submodules.self_attention
    attention.module = LocalLatentAttention if is_latent else CachedSelfAttention
    is_alone = config.context_parallel_size == 1
    attention.submodules.core_attention = SDPACoreAttention if is_alone else ContextCoreAttention
    if config.qk_layernorm:
        for norm in ("q_layernorm", "kv_layernorm" if is_latent else "k_layernorm"):
            setattr(attention.submodules, norm, RMSNorm)
    return spec


def _te_checkpoint_keys(*, is_latent: bool, is_moe: bool) -> dict[str, str]:
    """Prefixes of the norms that TransformerEngine fuses into the projection after them, and their names there.

    With them a checkpoint of either kind of layer loads into the other. Megatron-Core's local spec maps no norm of
    latent attention, and maps the one before experts, which TransformerEngine does not fuse.
    """
    keys = {}
    if is_latent:
        keys["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
        keys["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
    else:
        keys["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if not is_moe:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return keys


def _te_layer_spec(config: TransformerConfig, *, is_moe: bool) -> Any:
    """TransformerEngine layers, with its varlen attention for training and SDPA over the KV cache."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class TECoreAttention(TEDotProductAttention):
        def __init__(self, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
            super().__init__(*args, softmax_scale=softmax_scale, **kwargs)
            self._scale_of_cached = softmax_scale

        def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Tensor:
            if kwargs.get("packed_seq_params") is None:
                return cached_attention(query, key, value, attention_mask, self._scale_of_cached)
            return super().forward(query, key, value, attention_mask, **kwargs)

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    attention = spec.submodules.self_attention
    attention.module = CachedLatentAttention if config.multi_latent_attention else CachedSelfAttention
    attention.submodules.core_attention = TECoreAttention
    # What TransformerEngine wants for packed (thd) sequences.
    attention.params = {**attention.params, "attn_mask_type": AttnMaskType.padding_causal}
    return spec


def _te_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
