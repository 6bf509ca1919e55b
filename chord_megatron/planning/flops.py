"""Floating-point operations of a token in each part of the model."""

from __future__ import annotations

from collections import Counter

from chord_megatron.planning.memory import parameters_by_place
from chord_megatron.weights.architecture import ModelArchitecture


def layer_flops(arch: ModelArchitecture, layer: int, mean_row: float = 0.0) -> float:
    """Of one token's forward pass through a layer (0-based): 2 for each weight that it meets, and attention.

    A query meets half of the mean_row tokens of its row on average, twice: their keys and their values.
    """
    held = parameters_by_place(arch, 1)[layer]
    value = arch.head_dim if arch.mla is None else arch.mla.v_head_dim
    return 2 * (held.dense + active_share(arch) * held.expert) + mean_row * arch.num_attention_heads * (
        arch.head_dim + value
    )


def head_flops(arch: ModelArchitecture) -> float:
    """Of the logits of one position."""
    return 2.0 * arch.hidden_size * arch.vocab_size


def token_flops(arch: ModelArchitecture, mean_row: float = 0.0) -> float:
    """Of one token's forward pass through all layers, without the head."""
    kinds = {arch.is_moe_layer(layer): layer for layer in range(arch.num_layers)}
    counts = Counter(arch.is_moe_layer(layer) for layer in range(arch.num_layers))
    return sum(count * layer_flops(arch, kinds[is_moe], mean_row) for is_moe, count in counts.items())


def active_share(arch: ModelArchitecture) -> float:
    """Of the experts' weights, those that one token meets."""
    return arch.moe.experts_per_token / arch.moe.num_experts if arch.moe else 0.0
