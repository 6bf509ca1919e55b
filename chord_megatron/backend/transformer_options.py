"""`model.transformer_config`: fields of Megatron-Core's configuration that are passed through as they stand."""

from __future__ import annotations

import contextlib
import enum
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from megatron.core.fp4_utils import get_fp4_align_size
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.transformer import TransformerConfig

from chord_megatron.backend import releases
from chord_megatron.config import ModelConfig, ParallelConfig
from chord_megatron.config_types import LARGEST_INTEGER, LARGEST_NUMBER
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import did_you_mean, one_line, shown

_GROUP = "model.transformer_config"

# What is not passed through, as patterns, and why. What a release adds is, unless a pattern says otherwise.
_OWNED: dict[str, str] = {
    "is set by model.dtype": "fp16 bf16 params_dtype pipeline_dtype enable_autocast autocast_dtype "
    "fp32_residual_connection",
    "is set by model.recompute": "recompute_* moe_layer_recompute num_microbatches_with_partial_*",
    "is set by parallel.pipeline_layout": "pipeline_model_parallel_layout account_for_*",
    "is set by parallel.context_parallel_size": "hierarchical_context_* hybrid_context_* max_seqlen_per_dp_cp_rank",
    "is set by parallel.expert_model_parallel_size": "expert_tensor_parallel_size moe_extended_tp",
    "is set by rollout.router_replay": "moe_enable_routing_replay",
    "is set by what is installed (docs/deployment.md)": "transformer_impl moe_grouped_gemm moe_use_legacy_*",
    "says what the model is, as its config.json does": "num_layers hidden_size num_attention_heads num_query_groups "
    "ffn_hidden_size kv_channels softmax_* "
    "normalization layernorm_epsilon layernorm_zero_centered_gamma add_*_bias add_bias_linear gated_linear_unit "
    "activation_func activation_func_clamp_value glu_linear_offset qk_layernorm qk_l2_norm attention_output_gate "
    "apply_residual_* apply_query_* multi_latent_attention no_rope_freq rotary_* rope_type mrope_section window_* "
    "experimental_attention_* dsa_* linear_* mamba_* use_mamba_* is_hybrid_model heterogeneous_* mtp_* *mup* "
    "num_moe_experts moe_layer_freq moe_ffn_hidden_size moe_latent_size moe_shared_expert_intermediate_size "
    "moe_shared_expert_gate moe_router_topk* moe_router_num_groups moe_router_group_topk moe_router_pre_softmax "
    "moe_router_score_function moe_router_enable_expert_bias moe_apply_probs_on_input q_lora_rank kv_lora_rank "
    "qk_head_dim qk_pos_emb_head_dim v_head_dim original_max_position_embeddings beta_* mscale*",
    "would lay the weights out otherwise than checkpoints and exports do": "fp8_param fp4_param *glu_interleave_size "
    "*gtp_weight_remat_size *num_weight_shards moe_single_grouped_* hetereogenous_dist_checkpoint",
    "would train on other log-probs, or another loss, than the objective has": "hidden_dropout attention_dropout "
    "calculate_per_token_loss moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff "
    "moe_input_jitter_eps moe_router_bias_update_rate moe_router_force_* moe_router_quantile_* moe_token_drop* "
    "moe_expert_*capacity_factor moe_pad_expert_input_to_capacity qk_clip* test_mode "
    "log_max_attention_logit cross_entropy_* defer_embedding_wgrad_compute wgrad_deferral_limit",
    "is for CUDA graphs, which cannot replay micro-batches of other lengths": "*cuda_graph* use_te_rng_tracker "
    "inference_rng_tracker",
    "is for Megatron-Core's own inference, which is not what samples here": "inference_* use_inference_* flash_decode "
    "cache_mla_latents mlp_chunks_for_prefill nccl_all_reduce_for_prefill",
    "is for a schedule that does not run here": "variable_seq_lengths overlap_p2p_comm batch_p2p_comm "
    "microbatch_group_size_per_vp_stage overlap_moe_expert_parallel_comm delay_wgrad_compute ep_overlap_*",
    "is for sequences that are not packed, and all are here": "fused_single_qkv_rope",
    "is for builds of torch that have torch.distributed.ring_exchange": "use_ring_exchange_p2p",
    "is for weights that are drawn, and these are read": "*init_method* perform_initialization use_cpu_initialization "
    "init_model_with_meta_device",
    "takes what a configuration cannot hold": "timers *_grads_func *_scale_func *_sync_func _* quant_recipe",
}
# Read by TransformerEngine's layers alone: the local ones would pass over them in silence, or fail later.
_OF_TRANSFORMER_ENGINE = (
    "fp8 fp4 tp_comm_overlap attention_backend flash_attention_version cp_comm_type symmetric_ar_type use_te_* "
    "use_transformer_engine_op_fuser use_kitchen* cpu_offloading fine_grained_activation_offloading "
    "activation_func_fp8_input_store moe_router_fusion moe_permute_fusion"
)


def checked_options(
    options: Mapping[str, Any], config_class: type[TransformerConfig], *, transformer_impl: str
) -> dict[str, Any]:
    """The options as the class takes them. Raises UserError: unknown, of another kind, not the user's, or unread."""
    known = [field.name for field in fields(config_class) if field.init]
    hints = get_type_hints(config_class)
    for name, value in options.items():
        if name not in known:
            nearest = did_you_mean(name, known) or "; see its TransformerConfig"
            release = f"megatron-core {releases.installed()}"
            raise UserError(f"{_GROUP}.{shown(name)[1:-1]} is no field of the configuration of {release}{nearest}")
        if reason := why_owned(name):
            raise UserError(f"{_GROUP}.{name} {reason}; remove it")
        if not _fits(value, hints[name]):
            raise UserError(f"{_GROUP}.{name}={shown(value)}: must be {_described(hints[name])}")
        if value and transformer_impl == "local" and _matches(name, _OF_TRANSFORMER_ENGINE):
            raise UserError(
                f"{_GROUP}.{name}={shown(value)} needs TransformerEngine on a GPU, which this machine lacks; remove "
                "it, or see what `chord-megatron doctor` says"
            )
    return {name: _converted(value, hints[name]) for name, value in options.items()}


@contextlib.contextmanager
def refusals_named(model: ModelConfig) -> Iterator[None]:
    """Within, what Megatron-Core says of the user's choices, on which it has many rules, is a UserError."""
    try:
        yield
    except (ValueError, AssertionError, TypeError, RuntimeError, ImportError, KeyError) as error:
        asked = [f"{_GROUP}.{name}" for name in model.transformer_config]
        asked += ["model.recompute"] * isinstance(model.recompute, list)
        if isinstance(error, UserError | torch.OutOfMemoryError) or not asked:
            raise
        raise UserError(f"Megatron-Core refuses {' or '.join(asked)}: {one_line(error)}") from error


def why_owned(name: str) -> str | None:
    """Why a field is not the user's; None where it is."""
    if name in ParallelConfig.model_fields:
        return f"is set by parallel.{name}"
    return next((reason for reason, patterns in _OWNED.items() if _matches(name, patterns)), None)


def token_multiple(config: TransformerConfig) -> int:
    """What the number of a rank's tokens has to be a multiple of, by the matrix multiplications in 8 and 4 bits."""
    if config.fp8:
        return get_fp8_align_size(config.fp8_recipe)
    return get_fp4_align_size(config.fp4_recipe) if config.fp4 else 1


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one that it is."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML is of this type; a choice of an enumeration is its name."""
    return any(_fits_one(value, kind) for kind in _alternatives(hint))


def _fits_one(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (list, tuple):
        if not isinstance(value, list) or not arguments:
            return isinstance(value, list)
        kinds = arguments * len(value) if origin is list else arguments
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if _is_enum(kind):
        return isinstance(value, str) and value in kind.__members__
    if kind in (int, float) and type(value) is int:
        return abs(value) <= LARGEST_INTEGER
    if kind is float and type(value) is float:
        return math.isfinite(value) and abs(value) <= LARGEST_NUMBER
    return kind in (bool, str, types.NoneType) and type(value) is kind


def _described(hint: Any) -> str:
    """What fits, in words."""
    words = dict.fromkeys(word for kind in _alternatives(hint) for word in _words(kind))
    *others, last = words or ["what a configuration cannot hold"]
    return f"{', '.join(others)} or {last}" if others else last


def _words(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [repr(choice) for choice in get_args(kind)]
    if _is_enum(kind):
        return [repr(name) for name in kind.__members__]
    plain = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}
    is_list = (get_origin(kind) or kind) in (list, tuple)
    return ["a list"] if is_list else [plain[kind]] if kind in plain else []


def _converted(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return [*value]  # Megatron-Core adds to some
    return hint[value] if _is_enum(hint) else value
