"""Sizes of published models."""

from __future__ import annotations

from chord_megatron.weights.architecture import ModelArchitecture

QWEN2_5_7B = ModelArchitecture(
    family="qwen2",
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    head_dim=128,
    vocab_size=152064,
    max_position_embeddings=32768,
    rope_theta=1e6,
    norm_eps=1e-6,
    tie_word_embeddings=False,
    qkv_bias=True,
    qk_layernorm=False,
)
