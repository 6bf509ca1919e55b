"""Between the `config.json` that Hugging Face writes and a ModelArchitecture.

Reading understands the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
A key that is neither modelled nor known to be harmless must be off (null, false, zero, empty): whatever else it
says would change what the model computes, and is refused by name.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from chord_megatron.system.errors import UserError
from chord_megatron.system.files import read_json_object
from chord_megatron.system.sentences import looked_for, shown
from chord_megatron.weights.architecture import (
    LatentAttention,
    LinearRope,
    Llama3Rope,
    MixtureOfExperts,
    ModelArchitecture,
    YarnRope,
)
from chord_megatron.weights.config_keys import NEUTRAL, REMEDIES, is_harmless
from chord_megatron.weights.config_values import (
    LARGEST,
    MOST_PARTS,
    MOST_POSITIONS,
    RefusedError,
    count,
    count_or_none,
    flag,
    list_of,
    positive,
)
from chord_megatron.weights.families import FAMILIES
from chord_megatron.weights.foreign import describe_adapter, describe_folder
from chord_megatron.weights.schema import Family
from chord_megatron.weights.tied_head import has_own_head

Rope = LinearRope | Llama3Rope | YarnRope
_ROPE_TYPES: dict[str, type[Rope]] = {"linear": LinearRope, "llama3": Llama3Rope, "yarn": YarnRope}
_ROPE_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}
_MOST_EXPERTS = 10**5  # of all layers; DeepSeek-V3 has 14,848

# Field of ModelArchitecture -> key of config.json, in every family.
_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
_ALSO_READ = {
    "architectures",
    "head_dim",
    "hidden_act",
    "layer_types",
    "num_key_value_heads",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
}


def read_architecture(model_dir: Path) -> ModelArchitecture:
    """The architecture in `model_dir/config.json`; UserError names whatever is missing or unsupported.

    Not tied where the weights beside it have an output layer of their own.
    """
    try:
        arch = parse_config(_read_json(model_dir))
    except RefusedError as refused:
        raise UserError(f"{model_dir}/config.json: {refused}.") from None
    return replace(arch, tie_word_embeddings=arch.tie_word_embeddings and not has_own_head(model_dir))


def parse_config(config: dict[str, Any]) -> ModelArchitecture:
    """The architecture that the content of a config.json describes."""
    family = _find_family(config)
    config = {key: value for key, value in (family.defaults | config).items() if value is not None}
    _refuse_unmodelled(config, family)
    numbers = {field: _number(config, field, key) for field, key in _KEYS.items()}
    heads = numbers["num_attention_heads"]
    mla = _latent_attention(config) if family.has_latent_attention else None
    # Old Llama checkpoints leave these out; the fall-backs are those of transformers. Latent attention has no groups.
    groups = heads if mla or "num_key_value_heads" not in config else count(config, "num_key_value_heads")
    if heads % groups:
        raise RefusedError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}; mend the config"
        )
    head_dim = count({"head_dim": numbers["hidden_size"] // heads} | config, "head_dim")
    rope_theta, rope_scaling = _rope(config, family)
    return ModelArchitecture(
        family=family.name,
        **numbers,
        num_query_groups=groups,
        head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim if mla else head_dim,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
        qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_layernorm,
        moe=_mixture_of_experts(config, family, numbers["num_layers"]) if family.moe_keys else None,
        mla=mla,
    )


def _number(config: dict[str, Any], field: str, key: str) -> Any:
    if field == "norm_eps":
        return positive(config, key)
    return count(config, key, most=MOST_PARTS if field == "num_layers" else LARGEST)


def make_config(arch: ModelArchitecture) -> dict[str, Any]:
    """The config.json of an architecture, in the spelling of transformers 4, which transformers 5 reads, too."""
    family = FAMILIES[arch.family]
    config: dict[str, Any] = {
        "architectures": [family.hf_class],
        "model_type": family.model_type,
        "hidden_act": "silu",
        **{key: getattr(arch, field) for field, key in _KEYS.items()},
        "num_key_value_heads": arch.num_query_groups,
        "tie_word_embeddings": arch.tie_word_embeddings,
        "rope_theta": arch.rope_theta,
        "rope_scaling": None,
        **{key: None for key in family.defaults if key == "sliding_window"},
    }
    if arch.rope_scaling:
        (rope_type,) = (name for name, kind in _ROPE_TYPES.items() if isinstance(arch.rope_scaling, kind))
        config["rope_scaling"] = {"rope_type": rope_type, **asdict(arch.rope_scaling)}
    if arch.mla:
        config |= asdict(arch.mla)
    else:
        config["head_dim"] = arch.head_dim
    if arch.moe:
        config |= {names[0]: getattr(arch.moe, field) for field, names in family.moe_keys.items()}
        if "num_groups" in family.moe_keys and arch.moe.num_groups is None:
            config |= {"n_group": 1, "topk_group": 1}
        config |= _dense_layer_keys(arch.moe, family)
        if arch.moe.shared_ffn_hidden_size:
            config["n_shared_experts"] = arch.moe.shared_ffn_hidden_size // arch.moe.ffn_hidden_size
    return config


def said_in_config(arch: ModelArchitecture, field: str) -> str:
    """What the config.json of an architecture says of one field (`ModelArchitecture.flat`), as `key=value`."""
    config, family = make_config(arch), FAMILIES[arch.family]
    keys = _KEYS | {"num_query_groups": "num_key_value_heads", "moe.shared_ffn_hidden_size": "n_shared_experts"}
    keys |= {f"moe.{name}": spellings[0] for name, spellings in family.moe_keys.items()}
    if field == "moe.dense_layers":
        key = "first_k_dense_replace" if "first_k_dense_replace" in config else "mlp_only_layers"
    else:
        key = keys.get(field, field.split(".")[-1])
    if key not in config:
        key = "architectures"  # which it follows from
    return f"{key}={config[key]}"


def check_config(arch: ModelArchitecture) -> None:
    """Raise UserError where no config.json that is read as this architecture can be written."""
    try:
        written = parse_config(make_config(arch)).flat()
        different = [f"{name}={value}" for name, value in arch.flat().items() if written.get(name) != value]
        reason = f"{', '.join(different)} is not supported for {FAMILIES[arch.family].hf_class}" if different else None
    except RefusedError as refused:
        reason = str(refused)
    if reason:
        raise UserError(f"no config.json can describe this model: {reason}.")


def _read_json(model_dir: Path) -> dict[str, Any]:
    if not model_dir.is_dir():
        raise UserError(
            f"the model folder {model_dir} is not a directory{looked_for(model_dir)}; download the model and give the "
            "folder that holds its config.json."
        )
    if adapter := describe_adapter(model_dir):
        raise UserError(f"{model_dir} {adapter}.")
    path = model_dir / "config.json"
    if not path.is_file():
        kind = describe_folder(model_dir) or "has no config.json; give a model folder saved by save_pretrained"
        raise UserError(f"{model_dir} {kind}.")
    return read_json_object(path, "download it again")


def _find_family(config: dict[str, Any]) -> Family:
    by_class = {family.hf_class: family for family in FAMILIES.values()}
    name = (list_of(config, "architectures", str, "names") or ["none"])[0]
    if name not in by_class:
        raise RefusedError(f"architecture {name} is not supported; use one of {', '.join(by_class)}")
    return by_class[name]


def _refuse_unmodelled(config: dict[str, Any], family: Family) -> None:
    """Raise for every key whose value would change what the model computes."""
    refused = [key for key, value in {"hidden_act": "silu", **family.only}.items() if config.get(key, value) != value]
    if set(list_of(config, "layer_types", str, "names")) - {"full_attention"}:
        refused.append("layer_types")
    known = _ALSO_READ | set(_KEYS.values()) | family.only.keys() | family.harmless
    known |= {name for names in family.moe_keys.values() for name in names}
    if family.has_latent_attention:
        known |= {field.name for field in fields(LatentAttention)}
    known |= family.defaults.keys() - {"sliding_window"}
    refused += [key for key, value in config.items() if key not in known and not is_harmless(key, value)]
    if refused:
        values = ", ".join(f"`{key}: {config[key]}`" for key in refused)
        remedies = [REMEDIES[key] for key in refused if key in REMEDIES]
        remedy = (remedies or ["use a model without, or add what it means (docs/adding-a-model.md)"])[0]
        raise RefusedError(f"{values} is not supported for {family.hf_class}; {remedy}")


def _rope(config: dict[str, Any], family: Family) -> tuple[float, Rope | None]:
    """(theta, scaling); transformers 5 keeps both in rope_parameters."""
    key = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    if not all(isinstance(config.get(name, {}), dict) for name in ("rope_scaling", "rope_parameters")):
        raise RefusedError(f"`{key}` must be an object, found {shown(config[key])}")
    rope = config.get("rope_scaling", {}) | config.get("rope_parameters", {})
    theta = float(positive({"rope_theta": config.get("rope_theta", 10000.0)} | rope, "rope_theta"))
    # "type" is the spelling of old checkpoints; transformers reads a mapping with neither as the default.
    old_name = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", old_name)
    if rope_type not in family.rope_types:
        raise RefusedError(
            f"`{key}` of type {rope_type} is not supported for {family.hf_class}; "
            f"use a model with one of {', '.join(family.rope_types)}"
        )
    if rope_type == "default":
        names, scaling = [], None
    else:
        kind = _ROPE_TYPES[rope_type]
        names = [field.name for field in fields(kind)]
        said = {f"{key}.{name}": value for name, value in (_ROPE_DEFAULTS | rope).items()}
        scaling = kind(**{name: _rope_value(said, f"{key}.{name}") for name in names})
    unknown = [n for n, value in rope.items() if n not in ("rope_theta", *names) and not _is_off(n, value)]
    if unknown:
        raise RefusedError(f"`{key}` of type {rope_type} has {', '.join(unknown)}, which is not supported")
    return theta, scaling


def _rope_value(said: dict[str, Any], key: str) -> Any:
    return count(said, key, most=MOST_POSITIONS) if key.endswith("_position_embeddings") else positive(said, key)


def _is_off(name: str, value: Any) -> bool:
    return value is None or (name in NEUTRAL and value == NEUTRAL[name])


def _latent_attention(config: dict[str, Any]) -> LatentAttention:
    names = [field.name for field in fields(LatentAttention) if field.name != "q_lora_rank"]
    return LatentAttention(
        q_lora_rank=count(config, "q_lora_rank") if "q_lora_rank" in config else None,
        **{name: count(config, name) for name in names},
    )


def _mixture_of_experts(config: dict[str, Any], family: Family, num_layers: int) -> MixtureOfExperts:
    values: dict[str, Any] = {field: _moe_value(config, field, names) for field, names in family.moe_keys.items()}
    _check_groups(values)
    if num_layers * values["num_experts"] > _MOST_EXPERTS:
        raise RefusedError(
            f"{num_layers} layers of {values['num_experts']} experts are more than {_MOST_EXPERTS}; mend the config"
        )
    first = count_or_none(config, "first_k_dense_replace")
    step = count({"decoder_sparse_step": 1} | config, "decoder_sparse_step")
    named = {*list_of(config, "mlp_only_layers", int, "layer numbers")}
    dense = (layer for layer in range(num_layers) if layer < first or layer in named or (layer + 1) % step)
    return MixtureOfExperts(
        **family.moe_settings,
        **values,
        dense_layers=tuple(dense),
        shared_ffn_hidden_size=values["ffn_hidden_size"] * count_or_none(config, "n_shared_experts") or None,
    )


def _moe_value(config: dict[str, Any], field: str, names: tuple[str, ...]) -> Any:
    if field == "normalize_top_k":
        return flag(config, *names)
    if field == "routed_scaling_factor":
        return positive(config, *names)
    return count(config, *names, most=LARGEST if field == "ffn_hidden_size" else MOST_PARTS)


def _check_groups(values: dict[str, Any]) -> None:
    """One group is none; of several, Megatron-Core cannot score every kind as transformers does."""
    if values.get("num_groups") == 1:
        values["num_groups"] = values["top_k_groups"] = None
    groups, chosen = values.get("top_k_groups"), values["experts_per_token"]
    # transformers adds up the two best scores of a group, group_limited_topk the chosen // groups best ones.
    if groups is not None and chosen // groups != 2:
        raise RefusedError(
            f"`num_experts_per_tok: {chosen}` with `topk_group: {groups}` is not supported; "
            "use a model that chooses two experts per group, as DeepSeek-V3 does"
        )


def _dense_layer_keys(moe: MixtureOfExperts, family: Family) -> dict[str, Any]:
    """How this family's config.json says which layers have no experts."""
    if "first_k_dense_replace" in family.defaults:
        return {"first_k_dense_replace": len(moe.dense_layers), "n_shared_experts": 0}
    if "mlp_only_layers" in family.defaults:
        return {"mlp_only_layers": list(moe.dense_layers), "decoder_sparse_step": 1}
    return {}
