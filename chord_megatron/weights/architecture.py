"""The shape of a model: everything that the weight mapping and the model builder need to know about a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class LinearRope:
    """Rotary frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a ramp in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnRope:
    """YaRN (arXiv 2309.00071) as DeepSeek uses it: scaled frequencies and a larger softmax scale."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class MixtureOfExperts:
    """The MLPs that are routed: in every layer but `dense_layers`."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int  # of one expert
    score_function: Literal["softmax", "sigmoid"]
    normalize_top_k: bool  # the chosen experts' weights sum to 1
    dense_layers: tuple[int, ...] = ()  # 0-based, with a plain MLP of ModelArchitecture.ffn_hidden_size
    shared_ffn_hidden_size: int | None = None  # of the experts that see every token, taken together
    num_groups: int | None = None  # experts are chosen among those of the `top_k_groups` best groups
    top_k_groups: int | None = None
    routed_scaling_factor: float = 1.0
    has_expert_bias: bool = False  # added to the scores for choosing, not for weighting


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (MLA) of DeepSeek-V2 and V3."""

    q_lora_rank: int | None  # None: queries are projected directly
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class ModelArchitecture:
    """A decoder with RMSNorm, rotary embeddings and gated SiLU MLPs."""

    family: str  # name of one of families.FAMILIES
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    head_dim: int
    vocab_size: int  # without padding
    max_position_embeddings: int
    rope_theta: float
    norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_layernorm: bool
    rope_scaling: LinearRope | Llama3Rope | YarnRope | None = None
    moe: MixtureOfExperts | None = None
    mla: LatentAttention | None = None

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer (0-based) has experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers (0-based) that have experts."""
        return tuple(filter(self.is_moe_layer, range(self.num_layers)))

    def flat(self) -> dict[str, Any]:
        """Every field by name; in place of the parts their fields, behind `moe.` and `mla.`."""
        parts = {"moe": self.moe, "mla": self.mla}
        own = {name: value for name, value in vars(self).items() if name not in parts}
        return own | {
            f"{name}.{field}": value for name, part in parts.items() if part for field, value in vars(part).items()
        }
