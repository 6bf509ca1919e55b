"""Attention of the local (not TransformerEngine) model: torch SDPA over packed sequences, and a KV cache.

Megatron-Core's own DotProductAttention materialises the scores and refuses packed sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from chord_megatron.backend import releases
from chord_megatron.types import Segment


class SDPACoreAttention(MegatronModule):
    """Causal attention of each packed sequence by itself; with a KV cache, attention under an explicit mask."""

    def __init__(
        self, config: Any, layer_number: int, *args: Any, softmax_scale: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(config=config)
        self._softmax_scale = softmax_scale  # None = 1 / sqrt(head)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[tokens, heads, head] packed -> [tokens, heads * head], or cached -> [length, batch, heads * head]."""
        assert attention_bias is None
        if packed_seq_params is None:
            assert attention_mask is not None
            return cached_attention(query, key, value, attention_mask, self._softmax_scale)
        is_plain = not isinstance(packed_seq_params, SegmentedSequences)
        segments = segments_of(packed_seq_params.cu_seqlens_q) if is_plain else packed_seq_params.segments
        return packed_attention(query, key, value, segments, self._softmax_scale)


@dataclass
class SegmentedSequences(PackedSeqParams):
    """Packed tokens of which some attend to a prompt that stands elsewhere."""

    segments: Sequence[Segment] = ()


def segments_of(cu_seqlens: Tensor) -> list[Segment]:
    """Whole sequences."""
    return [Segment(start, end - start) for start, end in pairwise(cu_seqlens.tolist())]


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float | None = None
) -> Tensor:
    """Causal attention of each segment and its prompt. [tokens, heads, head] -> [tokens, heads * value's head]."""
    rows, outputs = [], []
    for row, prompt in places_by_form(segments, query.device):
        seen = torch.cat([prompt, row], dim=1)
        q, k, v = (x[places].transpose(1, 2) for x, places in ((query, row), (key, seen), (value, seen)))
        output = causal_attention(q, k, v, scale)
        rows.append(row.flatten())
        outputs.append(output.transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(outputs)[torch.cat(rows).argsort()]


def places_by_form(segments: Sequence[Segment], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The places of the tokens of segments of one form, and of their prompts, [segments, length] each; for each form.

    They are one SDPA call: short segments would otherwise spend their time in call overhead.
    """
    alike: dict[tuple[int, int], list[Segment]] = {}
    for segment in segments:
        alike.setdefault((segment.length, segment.prompt_length), []).append(segment)
    for (length, prompt_length), members in alike.items():
        starts = torch.tensor([(segment.start, segment.prompt_start) for segment in members], device=device)
        yield tuple(
            first[:, None] + torch.arange(n, device=device) for first, n in zip(starts.T, (length, prompt_length))
        )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """[batch, heads, length, head] each; the queries are the last of the keys' tokens."""
    length, attended = query.shape[2], key.shape[2]
    if length == attended:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    key, value = _whole_heads(query, key, value)
    mask = causal_lower_right(length, attended)  # no tensor, where a fused CUDA kernel takes it
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def _whole_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of each head, on CUDA: the fused kernel that takes a mask takes no grouped heads there."""
    if not key.is_cuda:
        return key, value
    heads_per_group = query.shape[1] // key.shape[1]
    return key.repeat_interleave(heads_per_group, dim=1), value.repeat_interleave(heads_per_group, dim=1)


def cached_attention(query: Tensor, keys: Tensor, values: Tensor, masked: Tensor, scale: float | None = None) -> Tensor:
    """query [length, batch, heads, head]; keys, values [batch, groups, cached, head]; masked [batch, 1, length,
    cached] with True = hidden (Megatron's convention). Returns [length, batch, heads * value's head]."""
    query = query.permute(1, 2, 0, 3)
    keys, values = _whole_heads(query, keys, values)
    output = F.scaled_dot_product_attention(query, keys, values, attn_mask=~masked, scale=scale, enable_gqa=True)
    return output.permute(2, 0, 1, 3).flatten(2)


class CachedSelfAttention(SelfAttention):
    """SelfAttention whose cache holds rotated keys as [batch, groups, length, head].

    Megatron-Core 0.16.1 caches keys before rotation and rotates the whole cache again at every token
    (Attention._adjust_key_value_for_inference); rotating once makes decoding five times as fast at 512 tokens.
    """

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        if inference_context is None:
            return query, key, value, rotary_pos_emb, self.attn_mask_type, None
        start = inference_context.sequence_len_offset
        end = start + key.shape[0]
        query, key = (
            apply_rotary_pos_emb(x, emb[start:end], config=self.config, cp_group=self.pg_collection.cp)
            for x, emb in zip((query, key), rotary_pos_emb)
        )
        keys, values = _append_to_cache(inference_context, self.layer_number, key, value)
        return query, keys, values, None, AttnMaskType.arbitrary, None


class CachedLatentAttention(MLASelfAttention):
    """Multi-head latent attention whose cache holds what SDPA reads: rotated keys and values of every head.

    Megatron-Core's static cache has another shape, and its cache of the latents needs FlashMLA.
    """

    def _adjust_key_value_for_inference(
        self, inference_context: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple:
        if inference_context is None:
            return query, key, value, None, self.attn_mask_type, None
        keys, values = _append_to_cache(inference_context, self.layer_number, key, value)
        return query, keys, values, None, AttnMaskType.arbitrary, None

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        return releases.latent_norms_of_spec(submodules)


class LocalLatentAttention(CachedLatentAttention):
    """Latent attention with the down projections whole on every tensor-parallel rank, as TransformerEngine has them.

    The local spec splits them and gathers the result, and the gradient of the gathered rotary key then comes from
    the heads of one rank only (gather_from_tensor_model_parallel_region: its backward splits without summing).
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config, config.hidden_size, config.q_lora_rank)
        key_size = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = ReplicatedLinear(config, config.hidden_size, key_size)


class ReplicatedLinear(torch.nn.Linear):
    """A bias-free projection of each rank's share of the sequence; returns (output, no bias)."""

    def __init__(self, config: Any, input_size: int, output_size: int) -> None:
        super().__init__(
            input_size, output_size, bias=False, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        mark_sequence_parallel(self.weight, config)

    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), None


def mark_sequence_parallel(weight: Any, config: Any) -> None:
    """Have Megatron-Core sum the gradient of a whole weight over TP, where each rank sees a share of the sequence."""
    weight.sequence_parallel = config.sequence_parallel


def _append_to_cache(context: Any, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keep key and value [length, batch, groups, head]; returns all so far, [batch, groups, cached, head]."""
    start = context.sequence_len_offset
    end = start + key.shape[0]
    cache = context.key_value_memory_dict
    if layer_number not in cache:
        cache[layer_number] = tuple(
            x.new_empty((x.shape[1], x.shape[2], context.max_sequence_length, x.shape[3])) for x in (key, value)
        )
    for cached, new in zip(cache[layer_number], (key, value)):
        cached[:, :, start:end] = new.permute(1, 2, 0, 3)
    keys, values = cache[layer_number]
    return keys[:, :, :end], values[:, :, :end]
