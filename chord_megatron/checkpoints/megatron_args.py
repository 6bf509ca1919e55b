"""The architecture in the arguments that Megatron-LM keeps in a checkpoint's common state."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chord_megatron.checkpoints.bounded_pickle import Inert, InertUnpickler, torch_pickle
from chord_megatron.checkpoints.common_state import common_state_bytes, unwrap_common_state
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import (
    LatentAttention,
    LinearRope,
    Llama3Rope,
    MixtureOfExperts,
    ModelArchitecture,
    YarnRope,
)
from chord_megatron.weights.config_values import MOST_PARTS
from chord_megatron.weights.hf_config import check_config, said_in_config

# What every model of ours has; a checkpoint that says otherwise holds another model. Names change with the release.
_REQUIRED = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "apply_layernorm_1p": False,  # up to 0.15
    "layernorm_zero_centered_gamma": False,  # the same, since 0.16
    "mtp_num_layers": None,
    "qk_l2_norm": False,
    "no_rope_freq": None,
    "window_size": None,
    "softmax_type": "vanilla",
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "heterogeneous_layers_config_path": None,
    "is_hybrid_model": False,
    "moe_shared_expert_gate": False,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
}
# Of MLATransformerConfig; Megatron-LM has no arguments for most of them.
_YARN_DEFAULTS = {
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}


def read_megatron_args(checkpoint: Path) -> dict[str, Any] | None:
    """Megatron-LM's arguments, or None where the checkpoint has none. Nothing in the file is executed."""
    content = common_state_bytes(checkpoint, "copy the checkpoint again")
    if content is None:
        return None
    try:
        common = unwrap_common_state(InertUnpickler(torch_pickle(io.BytesIO(content))).load())
    except Exception as error:  # damaged pickles fail in every way there is
        raise UserError(f"the common state of {checkpoint} is damaged ({error}); copy the checkpoint again") from error
    args = common.get("args") if isinstance(common, dict) else None
    return dict(vars(args)) if isinstance(args, Inert) else None


@dataclass(frozen=True)
class _Said:
    """How one field of the architecture follows from the arguments; `value` raises KeyError where one is absent."""

    names: tuple[str, ...]  # the arguments that say it, under the names of every release
    value: Callable[[Mapping[str, Any]], Any]

    def read(self, args: Mapping[str, Any]) -> Any:
        """UserError where the arguments do not say it."""
        try:
            return self.value(args)
        except KeyError as error:
            raise UserError(
                f"the checkpoint's arguments do not say {error.args[0]}; "
                "name a folder with the model's config.json by --hf-config"
            ) from None

    def contradiction(self, args: Mapping[str, Any], expected: Any) -> str | None:
        """The arguments that say something else; None also where they do not say it."""
        present = [name for name in self.names if name in args]
        try:
            if not present or self.value(args) == expected:
                return None
        except KeyError:
            return None
        return ", ".join(f"{name}={args[name]}" for name in present)


def _plain(name: str, convert: Callable[[Any], Any] = lambda value: value) -> _Said:
    return _Said((name,), lambda args: convert(args[name]))


def _optional(name: str, convert: Callable[[Any], Any] = lambda value: value) -> _Said:
    """An argument that earlier releases do not have; then it is off."""
    return _Said((name,), lambda args: convert(args.get(name)))


def architecture_from_args(args: Mapping[str, Any]) -> ModelArchitecture:
    """The architecture of a model that Megatron-LM trained with these arguments; UserError names what it lacks."""
    _refuse_unmodelled(args)
    vocab_size = _vocab_size(args)
    said = {field: said.read(args) for field, said in _said(args).items()}
    own: dict[str, Any] = {field: value for field, value in said.items() if "." not in field}
    arch = ModelArchitecture(
        family=_family(args),
        vocab_size=vocab_size,
        moe=MixtureOfExperts(**_below("moe.", said)) if said["moe.num_experts"] else None,
        mla=LatentAttention(**_below("mla.", said)) if said["mla.kv_lora_rank"] else None,
        **own,
    )
    check_config(arch)
    return arch


def refuse_other_args(args: Mapping[str, Any], arch: ModelArchitecture) -> None:
    """Raise UserError where the arguments contradict the architecture that config.json describes.

    The family is not compared (Mistral's arguments are Llama's), nor the length (that of the training), nor a
    vocabulary that config.json says to be larger: then it counts rows of padding.
    """
    _refuse_unmodelled(args)
    expected = {"moe.num_experts": None, "mla.kv_lora_rank": None} | arch.flat()
    del expected["max_position_embeddings"]
    if arch.moe and not arch.moe.dense_layers:
        del expected["ffn_hidden_size"]  # of no layer
    wrong = {
        field: said.contradiction(args, expected[field]) for field, said in _said(args).items() if field in expected
    }
    found = [f"{text} where config.json says {said_in_config(arch, field)}" for field, text in wrong.items() if text]
    if (args.get("vocab_size") or 0) > arch.vocab_size:
        found.append(f"vocab_size={args['vocab_size']} where config.json says vocab_size={arch.vocab_size}")
    if text := ", ".join(found):
        raise UserError(f"the checkpoint was trained with {text}; use the config.json that belongs to these weights")


def _said(args: Mapping[str, Any]) -> dict[str, _Said]:
    """How the arguments say each field; those of experts behind `moe.`, those of latent attention behind `mla.`."""
    attention = _LATENT_ATTENTION if args.get("multi_latent_attention") else _GROUPED_ATTENTION
    return _MODEL | attention | (_EXPERTS if args.get("num_experts") else _NO_EXPERTS)


def _below(prefix: str, said: dict[str, Any]) -> dict[str, Any]:
    return {field.removeprefix(prefix): value for field, value in said.items() if field.startswith(prefix)}


def _refuse_unmodelled(args: Mapping[str, Any]) -> None:
    refused = [f"{name}={args[name]}" for name, value in _REQUIRED.items() if args.get(name, value) != value]
    # Without YaRN its factor still enters the softmax scale (multi_latent_attention.py, MultiLatentAttention).
    scale = ("rope_type", "rotary_scaling_factor", "mscale_all_dim")
    if args.get("multi_latent_attention") and args.get("rope_type") == "rope" and args.get("mscale_all_dim"):
        refused += [f"{name}={args.get(name)}" for name in scale] if args.get("rotary_scaling_factor") != 1.0 else []
    if refused:
        raise UserError(f"the checkpoint was trained with {', '.join(refused)}, which no supported model family has")


def _family(args: Mapping[str, Any]) -> str:
    """The family whose tensors these are; Mistral's are Llama's."""
    families = {
        # experts, latent attention, bias, norms on queries and keys
        (False, False, False, False): "llama",
        (False, False, True, False): "qwen2",
        (False, False, False, True): "qwen3",
        (True, False, False, False): "mixtral",
        (True, False, False, True): "qwen3_moe",
        (True, True, False, True): "deepseek_v3",
    }
    names = ("num_experts", "multi_latent_attention", "add_qkv_bias", "qk_layernorm")
    traits = tuple(bool(args.get(name)) for name in names)
    if traits not in families:
        texts = ("experts", "latent attention", "biases on query, key and value", "norms on queries and keys")
        text = ", ".join(text for text, has_it in zip(texts, traits, strict=True) if has_it)
        raise UserError(f"no supported model family combines {text}")
    return families[traits]


def _vocab_size(args: Mapping[str, Any]) -> int:
    """Without padding.

    Up to 0.17 NullTokenizer adds an end of document to `vocab_size`; since 0.18 it takes the last one, or that which
    the argument says (null_tokenizer.py, NullTokenizer).
    """
    if args.get("vocab_size") is None:
        raise UserError(
            "the checkpoint does not say its vocabulary size without padding; "
            "name a folder with the model's config.json by --hf-config"
        )
    adds_one = args.get("tokenizer_type") == "NullTokenizer" and "null_tokenizer_eod_id" not in args
    return args["vocab_size"] + adds_one


def _norm_eps(args: Mapping[str, Any]) -> float:
    return args["norm_epsilon"] if "norm_epsilon" in args else args["layernorm_epsilon"]


def _query_groups(args: Mapping[str, Any]) -> int:
    return args["num_query_groups" if args.get("group_query_attention") else "num_attention_heads"]


def _rope_scaling(args: Mapping[str, Any]) -> LinearRope | Llama3Rope | None:
    """Of Llama 3's scaling Megatron-LM only chooses the factor (rotary_pos_embedding.py, _apply_scaling)."""
    if args.get("use_rope_scaling"):
        return Llama3Rope(args.get("rope_scaling_factor", 8.0), 1.0, 4.0, 8192)
    interpolation = args.get("rotary_seq_len_interpolation_factor")
    return LinearRope(float(interpolation)) if interpolation else None


def _yarn(args: Mapping[str, Any]) -> YarnRope | None:
    """A type of None is the default of MLATransformerConfig."""
    if (args.get("rope_type") or "yarn") != "yarn" or args["rotary_scaling_factor"] == 1.0:
        return None
    settings = {name: args.get(name, default) for name, default in _YARN_DEFAULTS.items()}
    return YarnRope(args["rotary_scaling_factor"], **settings)


def _dense_layers(args: Mapping[str, Any]) -> tuple[int, ...]:
    frequency = args.get("moe_layer_freq", 1)
    every = range(min(args["num_layers"], MOST_PARTS))  # more are refused in the end
    pattern = [int(layer % frequency == 0) for layer in every] if isinstance(frequency, int) else frequency
    return tuple(layer for layer in every if not pattern[layer])


def _normalize_top_k(args: Mapping[str, Any]) -> bool:
    """Sigmoid scores are always divided by their sum (moe_utils.py, topk_routing_with_score_function)."""
    return args.get("moe_router_score_function") == "sigmoid" or not args.get("moe_router_pre_softmax")


_MODEL = {
    "num_layers": _plain("num_layers"),
    "hidden_size": _plain("hidden_size"),
    "ffn_hidden_size": _plain("ffn_hidden_size"),
    "num_attention_heads": _plain("num_attention_heads"),
    "max_position_embeddings": _plain("max_position_embeddings"),
    "rope_theta": _plain("rotary_base", float),
    "norm_eps": _Said(("norm_epsilon", "layernorm_epsilon"), _norm_eps),  # up to 0.15, since 0.16
    "tie_word_embeddings": _plain("untie_embeddings_and_output_weights", lambda untied: not untied),
    "qkv_bias": _optional("add_qkv_bias", bool),
}
_GROUPED_ATTENTION = {
    "num_query_groups": _Said(("group_query_attention", "num_query_groups"), _query_groups),
    "head_dim": _plain("kv_channels"),
    "qk_layernorm": _optional("qk_layernorm", bool),
    "rope_scaling": _Said(
        ("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor"), _rope_scaling
    ),
    "mla.kv_lora_rank": _Said(("multi_latent_attention",), lambda args: None),
}
_LATENT_ATTENTION = {
    "num_query_groups": _plain("num_attention_heads"),
    "head_dim": _Said(
        ("qk_head_dim", "qk_pos_emb_head_dim"), lambda args: args["qk_head_dim"] + args["qk_pos_emb_head_dim"]
    ),
    "qk_layernorm": _Said((), lambda args: False),  # its norms are on the latents
    "rope_scaling": _Said(("rope_type", "rotary_scaling_factor", *_YARN_DEFAULTS), _yarn),
    "mla.q_lora_rank": _optional("q_lora_rank"),
    "mla.kv_lora_rank": _plain("kv_lora_rank"),
    "mla.qk_nope_head_dim": _plain("qk_head_dim"),
    "mla.qk_rope_head_dim": _plain("qk_pos_emb_head_dim"),
    "mla.v_head_dim": _plain("v_head_dim"),
}
_NO_EXPERTS = {"moe.num_experts": _optional("num_experts", lambda number: number or None)}
_EXPERTS = {
    "moe.num_experts": _plain("num_experts"),
    "moe.experts_per_token": _plain("moe_router_topk"),
    "moe.ffn_hidden_size": _Said(
        ("moe_ffn_hidden_size",), lambda args: args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"]
    ),
    "moe.score_function": _optional("moe_router_score_function", lambda name: name or "softmax"),
    "moe.normalize_top_k": _Said(("moe_router_pre_softmax",), _normalize_top_k),
    "moe.dense_layers": _Said(("moe_layer_freq",), _dense_layers),
    "moe.shared_ffn_hidden_size": _optional("moe_shared_expert_intermediate_size"),
    # One group is none.
    "moe.num_groups": _optional("moe_router_num_groups", lambda groups: groups if (groups or 1) > 1 else None),
    "moe.top_k_groups": _Said(
        ("moe_router_num_groups", "moe_router_group_topk"),
        lambda args: args.get("moe_router_group_topk") if (args.get("moe_router_num_groups") or 1) > 1 else None,
    ),
    "moe.routed_scaling_factor": _optional("moe_router_topk_scaling_factor", lambda factor: factor or 1.0),
    "moe.has_expert_bias": _optional("moe_router_enable_expert_bias", bool),
}
