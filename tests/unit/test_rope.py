"""Scaled rotary frequencies against those of transformers."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from chord_megatron.backend.rope import scaled_inverse_frequencies
from chord_megatron.weights.architecture import LinearRope, Llama3Rope


@pytest.mark.parametrize(
    ("rope_type", "scaling"),
    [
        ("linear", LinearRope(factor=4.0)),
        ("llama3", Llama3Rope(8.0, 1.0, 4.0, 8192)),  # Llama 3.1
        ("llama3", Llama3Rope(32.0, 1.0, 4.0, 8192)),  # Llama 3.2
        ("llama3", Llama3Rope(4.0, 2.0, 3.0, 64)),
    ],
)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_are_those_of_transformers(rope_type: str, scaling: LinearRope | Llama3Rope, theta: float):
    rope = {"rope_type": rope_type, "rope_theta": theta, **asdict(scaling)}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=8192, rope_parameters=rope)
    expected, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu")
    assert attention_factor == 1.0
    torch.testing.assert_close(scaled_inverse_frequencies(128, theta, scaling), expected, rtol=1e-6, atol=0)


def test_llama3_keeps_short_wavelengths_and_divides_long_ones():
    frequencies = scaled_inverse_frequencies(4, 1e4, Llama3Rope(8.0, 1.0, 4.0, 100))
    # 1 radian a position turns 15.9 times within 100 positions, 0.01 radians 0.16 times.
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.01 / 8]))


def test_llama3_goes_over_linearly_in_between():
    # 2 pi / 40 radians a position turn 2.5 times within 100 positions, half way from 1 to 4: (1 + 1 / 8) / 2.
    theta = (40 / (2 * torch.pi)) ** 2
    frequencies = scaled_inverse_frequencies(4, theta, Llama3Rope(8.0, 1.0, 4.0, 100))
    torch.testing.assert_close(frequencies[1].item(), 2 * torch.pi / 40 * 0.5625)
