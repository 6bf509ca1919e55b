"""The architecture in the arguments that Megatron-LM keeps in a checkpoint's `common.pt`."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import (
    LatentAttention,
    Llama3Rope,
    MixtureOfExperts,
    ModelArchitecture,
    YarnRope,
)

# What every model of ours has; a checkpoint that says otherwise holds another model.
_REQUIRED = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "apply_layernorm_1p": False,
    "mtp_num_layers": None,
    "qk_l2_norm": False,
    "window_size": None,
    "softmax_type": "vanilla",
    "moe_shared_expert_gate": False,
}


def read_megatron_args(checkpoint: Path) -> dict[str, Any] | None:
    """Megatron-LM's arguments, or None where the checkpoint has none. Nothing in the file is executed."""
    try:
        with zipfile.ZipFile(checkpoint / "common.pt") as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                common = _InertUnpickler(file).load()
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged pickles fail in every way there is
        raise UserError(f"{checkpoint / 'common.pt'} is damaged ({error}); copy the checkpoint again") from error
    args = common.get("args") if isinstance(common, dict) else None
    return dict(vars(args)) if isinstance(args, _Inert) else None


def architecture_from_args(args: Mapping[str, Any]) -> ModelArchitecture:
    """The architecture of a model that Megatron-LM trained with these arguments; UserError names what it lacks."""
    refused = [name for name, value in _REQUIRED.items() if args.get(name, value) != value]
    if refused:
        text = ", ".join(f"{name}={args[name]}" for name in refused)
        raise UserError(f"the checkpoint was trained with {text}, which no supported model family has")
    if args.get("vocab_size") is None:
        raise UserError(
            "the checkpoint does not say its vocabulary size without padding; "
            "name a folder with the model's config.json by --hf-config"
        )
    moe = _experts(args) if args.get("num_experts") else None
    mla = _latent_attention(args) if args.get("multi_latent_attention") else None
    qk_layernorm, qkv_bias = bool(args.get("qk_layernorm")), bool(args.get("add_qkv_bias"))
    heads = args["num_attention_heads"]
    return ModelArchitecture(
        family=_family(moe, mla, qkv_bias=qkv_bias, qk_layernorm=qk_layernorm),
        num_layers=args["num_layers"],
        hidden_size=args["hidden_size"],
        ffn_hidden_size=args["ffn_hidden_size"],
        num_attention_heads=heads,
        num_query_groups=args["num_query_groups"] if args.get("group_query_attention") and not mla else heads,
        head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim if mla else args["kv_channels"],
        vocab_size=args["vocab_size"],
        max_position_embeddings=args["max_position_embeddings"],
        rope_theta=float(args["rotary_base"]),
        norm_eps=args["norm_epsilon"],
        tie_word_embeddings=not args["untie_embeddings_and_output_weights"],
        qkv_bias=qkv_bias,
        qk_layernorm=qk_layernorm and mla is None,
        rope_scaling=_yarn(args) if mla else _llama3(args),
        moe=moe,
        mla=mla,
    )


def refuse_other_args(args: Mapping[str, Any], arch: ModelArchitecture) -> None:
    """Raise UserError where the arguments contradict the architecture in what the shapes of tensors do not show."""
    said = {
        "rotary_base": arch.rope_theta,
        "norm_epsilon": arch.norm_eps,
        "moe_router_topk": arch.moe.experts_per_token if arch.moe else None,
    }
    for name, value in said.items():
        if value is not None and args.get(name, value) != value:
            raise UserError(
                f"the checkpoint was trained with {name}={args[name]}, and config.json says {value}; "
                "use the config.json that belongs to these weights"
            )


def _family(moe: MixtureOfExperts | None, mla: LatentAttention | None, *, qkv_bias: bool, qk_layernorm: bool) -> str:
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
    traits = (moe is not None, mla is not None, qkv_bias, qk_layernorm)
    if traits not in families:
        names = ("experts", "latent attention", "biases on query, key and value", "norms on queries and keys")
        text = ", ".join(name for name, has_it in zip(names, traits, strict=True) if has_it)
        raise UserError(f"no supported model family combines {text}")
    return families[traits]


def _experts(args: Mapping[str, Any]) -> MixtureOfExperts:
    frequency = args.get("moe_layer_freq", 1)
    every = range(args["num_layers"])
    pattern = [int(layer % frequency == 0) for layer in every] if isinstance(frequency, int) else frequency
    groups = args.get("moe_router_num_groups")
    return MixtureOfExperts(
        num_experts=args["num_experts"],
        experts_per_token=args["moe_router_topk"],
        ffn_hidden_size=args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"],
        score_function=args.get("moe_router_score_function", "softmax"),
        # Sigmoid scores are always divided by their sum (moe_utils.py, topk_routing_with_score_function).
        normalize_top_k=args.get("moe_router_score_function") == "sigmoid" or not args.get("moe_router_pre_softmax"),
        dense_layers=tuple(layer for layer in every if not pattern[layer]),
        shared_ffn_hidden_size=args.get("moe_shared_expert_intermediate_size"),
        num_groups=groups,
        top_k_groups=args.get("moe_router_group_topk") if groups else None,
        routed_scaling_factor=args.get("moe_router_topk_scaling_factor") or 1.0,
        has_expert_bias=bool(args.get("moe_router_enable_expert_bias")),
    )


def _latent_attention(args: Mapping[str, Any]) -> LatentAttention:
    return LatentAttention(
        q_lora_rank=args.get("q_lora_rank"),
        kv_lora_rank=args["kv_lora_rank"],
        qk_nope_head_dim=args["qk_head_dim"],
        qk_rope_head_dim=args["qk_pos_emb_head_dim"],
        v_head_dim=args["v_head_dim"],
    )


def _llama3(args: Mapping[str, Any]) -> Llama3Rope | None:
    """Of its scaling Megatron-LM only chooses the factor (rotary_pos_embedding.py, _apply_scaling)."""
    if not args.get("use_rope_scaling"):
        return None
    return Llama3Rope(args.get("rope_scaling_factor", 8.0), 1.0, 4.0, 8192)


def _yarn(args: Mapping[str, Any]) -> YarnRope | None:
    if args.get("rope_type", "yarn") != "yarn" or args["rotary_scaling_factor"] == 1.0:
        return None
    return YarnRope(
        args["rotary_scaling_factor"],
        args["original_max_position_embeddings"],
        args["beta_fast"],
        args["beta_slow"],
        args["mscale"],
        args["mscale_all_dim"],
    )


class _Inert:
    """Stands for an object of any class: keeps its attributes, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _InertUnpickler(pickle.Unpickler):
    """Builds plain values; of whatever names a class or function nothing is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, reference: Any) -> Any:  # a tensor's storage
        return None
