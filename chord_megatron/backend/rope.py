"""Rotary frequencies with the scalings, and angles at the positions, that Megatron-Core cannot be told."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from chord_megatron.weights.architecture import LinearRope, Llama3Rope


def scaled_inverse_frequencies(dim: int, theta: float, scaling: LinearRope | Llama3Rope) -> Tensor:
    """Radians per position of each rotary pair, [dim / 2] float32.

    Source: transformers, modeling_rope_utils.py, `_compute_linear_scaling_rope_parameters` and
    `_compute_llama3_parameters`.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if isinstance(scaling, LinearRope):
        return frequencies / scaling.factor
    # How often a pair turns within the length of the pre-training: few turns are stretched, many are kept.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


class PositionsBelow(int):
    """A sequence length for Megatron-Core's rotary embeddings that brings the position of each token with it.

    It comes through RotaryEmbedding.get_rotary_seq_len as PackedSeqParams.max_seqlen_q, wherever the embedding is
    called: by the model, or by each layer of latent attention, when it is recomputed, too.
    """

    position_ids: Tensor  # [tokens], below the length

    def __new__(cls, length: int, position_ids: Tensor) -> PositionsBelow:
        made = super().__new__(cls, length)
        made.position_ids = position_ids
        return made


def take_positions(_module: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    """A forward hook for rotary embeddings: the angles [length, ...] of each token's position, where they are told.

    Megatron-Core's thd RoPE takes as many angles as there are tokens to be one for each (rope_utils.py).
    """
    length = arguments[0]
    if not isinstance(length, PositionsBelow):
        return output
    if isinstance(output, tuple):  # YaRN: and a scale
        return output[0][length.position_ids], *output[1:]
    return output[length.position_ids]
