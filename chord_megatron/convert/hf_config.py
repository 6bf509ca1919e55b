"""The architecture in the `config.json` that Hugging Face writes, and what is refused there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chord_megatron.convert.architecture import ModelArchitecture
from chord_megatron.types import UserError


@dataclass(frozen=True)
class _Family:
    name: str
    qkv_bias: bool = False
    qk_layernorm: bool = False
    head_dim: int | None = None  # what transformers assumes when config.json has none; None = hidden / heads
    refused_flags: tuple[str, ...] = ()  # switches that add tensors which the family's table does not hold


_FAMILIES = {
    "Qwen2ForCausalLM": _Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": _Family("qwen3", qk_layernorm=True, head_dim=128, refused_flags=("attention_bias",)),
    "LlamaForCausalLM": _Family("llama", refused_flags=("attention_bias", "mlp_bias")),
}


def _is_scaled_rope(rope: dict[str, Any] | None) -> bool:
    # "type" is the spelling of old checkpoints; transformers reads a mapping with neither as the default.
    return rope is not None and rope.get("rope_type", rope.get("type", "default")) != "default"


# (key of config.json, whether its value is refused, remedy)
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("rope_scaling", _is_scaled_rope, "use a model with plain rotary embeddings"),
    ("rope_parameters", _is_scaled_rope, "use a model with plain rotary embeddings (rope_type: default)"),
    ("use_sliding_window", bool, "use a model with full attention (use_sliding_window: false)"),
    (
        "layer_types",
        lambda kinds: bool(set(kinds or ()) - {"full_attention"}),
        "use a model with full attention",
    ),
    ("hidden_act", lambda name: name not in (None, "silu"), "use a model with hidden_act: silu"),
    ("quantization_config", bool, "use the unquantized checkpoint"),
)


def read_architecture(model_dir: Path) -> ModelArchitecture:
    """The architecture in `model_dir/config.json`; UserError names whatever is missing or unsupported."""
    config = _read_config(model_dir)
    family = _find_family(config, model_dir)
    _refuse_unsupported(config, family, model_dir)

    def positive(key: str) -> Any:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{model_dir}/config.json: `{key}` must be a positive number, found {value!r}.")
        return value

    hidden_size, heads = positive("hidden_size"), positive("num_attention_heads")
    # Old Llama checkpoints leave these out; the fall-backs are those of transformers.
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise UserError(
            f"{model_dir}/config.json: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {groups}; mend the config."
        )
    # transformers 5 moved rope_theta into rope_parameters.
    rope = config.get("rope_parameters") or {}
    return ModelArchitecture(
        family=family.name,
        num_layers=positive("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=positive("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=config.get("head_dim") or family.head_dim or hidden_size // heads,
        vocab_size=positive("vocab_size"),
        max_position_embeddings=positive("max_position_embeddings"),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        norm_eps=positive("rms_norm_eps"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_layernorm,
    )


def _read_config(model_dir: Path) -> dict[str, Any]:
    if not model_dir.is_dir():
        raise UserError(f"the model folder {model_dir} is not a directory; give the folder that holds config.json.")
    path = model_dir / "config.json"
    if not path.is_file():
        raise UserError(f"{model_dir} has no config.json; give a model folder saved by save_pretrained.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object; download it again.")
    return config


def _find_family(config: dict[str, Any], model_dir: Path) -> _Family:
    names = config.get("architectures") or ["none"]
    if names[0] not in _FAMILIES:
        raise UserError(
            f"{model_dir}/config.json: architecture {names[0]} is not supported; use one of {', '.join(_FAMILIES)}."
        )
    return _FAMILIES[names[0]]


def _refuse_unsupported(config: dict[str, Any], family: _Family, model_dir: Path) -> None:
    flags = tuple((flag, bool, f"use a model with {flag}: false") for flag in family.refused_flags)
    for key, is_refused, remedy in (*_REFUSED, *flags):
        value = config.get(key)
        if is_refused(value):
            raise UserError(f"{model_dir}/config.json: `{key}: {value}` is not supported; {remedy}.")
