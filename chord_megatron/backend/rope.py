"""Rotary frequencies with the scalings that Megatron-Core cannot be told: it only takes a factor. Pure."""

from __future__ import annotations

import math

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
