"""What of Megatron-Core's configuration may be passed through, what may not, and in which words."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import pytest
import torch
from architectures import QWEN2_5_7B

from chord_megatron.backend import releases
from chord_megatron.backend.acceleration import Acceleration
from chord_megatron.backend.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
    _defaults,
    transformer_config,
)
from chord_megatron.backend.transformer_options import _OWNED, checked_options, token_multiple, why_owned
from chord_megatron.config import ModelConfig, ParallelConfig
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import LatentAttention, MixtureOfExperts, ModelArchitecture, YarnRope

AttnBackend = get_type_hints(TransformerConfig)["attention_backend"]
LOCAL = Acceleration("local", fuse_gradient_accumulation=False, overlap_grad_reduce=False)
EXPERTS = MixtureOfExperts(8, 2, 64, "sigmoid", normalize_top_k=True, shared_ffn_hidden_size=64, has_expert_bias=True)
DENSE = QWEN2_5_7B
SPARSE = dataclasses.replace(
    DENSE,
    moe=EXPERTS,
    mla=LatentAttention(None, 16, 12, 8, 10),
    rope_scaling=YarnRope(4.0, 4096, 32.0, 1.0, 1.0, 1.0),
)
RELEASE = f"megatron-core {releases.installed()}"


def built(
    options: dict[str, Any], arch: ModelArchitecture = DENSE, parallel: dict[str, Any] | None = None, **model: Any
) -> TransformerConfig:
    settings = ModelConfig(path="m", dtype="float32", transformer_config=options, **model)
    return transformer_config(arch, settings, ParallelConfig(**parallel or {}), LOCAL)


def refusal(options: dict[str, Any], *arguments: Any, **model: Any) -> str:
    with pytest.raises(UserError) as error:
        built(options, *arguments, **model)
    return str(error.value)


def test_what_is_passed_through_arrives():
    options = {
        "moe_router_dtype": "fp64",
        "disable_bf16_reduced_precision_matmul": True,
        "moe_deepep_num_sms": 24,
        "offload_modules": ["core_attn"],
    }
    config = built(options, SPARSE)
    assert {name: getattr(config, name) for name in options} == options
    assert built({}, SPARSE).moe_router_dtype == "fp32"


def test_what_a_user_does_not_say_is_as_ever():
    assert all(getattr(built({}), name) == value for name, value in _defaults(LOCAL).items())


def test_a_list_is_not_the_configurations_own():
    modules = ["core_attn"]
    assert built({"offload_modules": modules}).offload_modules is not modules


# Everything that this package sets, by any model: a user's value would meet it twice.
def test_what_is_set_here_is_not_passed_through(monkeypatch: pytest.MonkeyPatch):
    def names(arch: ModelArchitecture, **model: Any) -> set[str]:
        found: dict[str, Any] = {}

        def note(settings: Any, **given: Any) -> None:
            found.update(given)

        for config_class in (TransformerConfig, MLATransformerConfig):
            monkeypatch.setattr(config_class, "__init__", note)
        built({}, arch, {"pipeline_model_parallel_size": 2}, **model)
        return set(found)

    ours = names(DENSE) | names(SPARSE) | names(DENSE, recompute=True) | names(DENSE, recompute=["mlp"])
    assert {name for name in ours if not why_owned(name)} == set(_defaults(LOCAL))


def test_every_pattern_is_of_some_release():
    """Of the installed one, but for what only others have."""
    known = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    patterns = [pattern for patterns in _OWNED.values() for pattern in patterns.split()]
    assert len(patterns) == len(set(patterns))
    exact = {pattern for pattern in patterns if "*" not in pattern}
    assert exact - known <= {"moe_extended_tp", "nccl_all_reduce_for_prefill"}


def test_what_cannot_be_written_in_yaml_is_not_passed_through():
    hints = get_type_hints(MLATransformerConfig)
    callables = {name for name, hint in hints.items() if "Callable" in str(hint) or "dtype" in str(hint)}
    assert len(callables) > 8
    assert {name for name in callables if not why_owned(name)} == set()


# Option, value, and the sentence.
SENTENCES: list[tuple[str, Any, str]] = [
    (
        "fp9",
        "hybrid",
        f"model.transformer_config.fp9 is no field of the configuration of {RELEASE}; did you mean 'fp8'?",
    ),
    (
        "zzz",
        1,
        f"model.transformer_config.zzz is no field of the configuration of {RELEASE}; see its TransformerConfig",
    ),
    (
        "q_lora_rank",
        1,
        f"model.transformer_config.q_lora_rank is no field of the configuration of {RELEASE}; see its "
        "TransformerConfig",
    ),
    (
        "softmax_type",
        "learnable",
        "model.transformer_config.softmax_type says what the model is, as its config.json does; remove it",
    ),
    (
        "hidden_dropout",
        0.1,
        "model.transformer_config.hidden_dropout would train on other log-probs, or another loss, than the objective "
        "has; remove it",
    ),
    (
        "tensor_model_parallel_size",
        2,
        "model.transformer_config.tensor_model_parallel_size is set by parallel.tensor_model_parallel_size; remove it",
    ),
    ("bf16", True, "model.transformer_config.bf16 is set by model.dtype; remove it"),
    ("recompute_modules", ["mlp"], "model.transformer_config.recompute_modules is set by model.recompute; remove it"),
    (
        "fp8_param",
        True,
        "model.transformer_config.fp8_param would lay the weights out otherwise than checkpoints and exports do; "
        "remove it",
    ),
    (
        "cuda_graph_impl",
        "local",
        "model.transformer_config.cuda_graph_impl is for CUDA graphs, which cannot replay micro-batches of other "
        "lengths; remove it",
    ),
    ("timers", "x", "model.transformer_config.timers takes what a configuration cannot hold; remove it"),
    (
        "fp8_recipe",
        "x",
        "model.transformer_config.fp8_recipe='x': must be 'tensorwise', 'delayed', 'mxfp8', 'blockwise', 'custom' or "
        "null",
    ),
    ("fp8_margin", 1.5, "model.transformer_config.fp8_margin=1.5: must be an integer"),
    ("fp8_margin", True, "model.transformer_config.fp8_margin=True: must be an integer"),
    ("fp8_margin", 2**31, "model.transformer_config.fp8_margin=2147483648: must be an integer"),
    ("tp_comm_overlap", 1, "model.transformer_config.tp_comm_overlap=1: must be true or false"),
    ("tp_comm_overlap", "true", "model.transformer_config.tp_comm_overlap='true': must be true or false"),
    ("cp_comm_type", 1, "model.transformer_config.cp_comm_type=1: must be text, a list or null"),
    ("cp_comm_type", ["p2p", 1], "model.transformer_config.cp_comm_type=['p2p', 1]: must be text, a list or null"),
    ("offload_modules", "mlp", "model.transformer_config.offload_modules='mlp': must be a list or null"),
    (
        "attention_backend",
        "flsh",
        "model.transformer_config.attention_backend='flsh': must be "
        + ", ".join(repr(name) for name in [*AttnBackend.__members__][:-1])
        + f" or {[*AttnBackend.__members__][-1]!r}",
    ),
    (
        "fp8",
        "hybrid",
        "model.transformer_config.fp8='hybrid' needs TransformerEngine on a GPU, which this machine lacks; remove it, "
        "or see what `chord-megatron doctor` says",
    ),
    *(
        (
            name,
            True,
            f"model.transformer_config.{name}=True needs TransformerEngine on a GPU, which this machine lacks; remove "
            "it, or see what `chord-megatron doctor` says",
        )
        for name in ("moe_router_fusion", "moe_permute_fusion")
    ),
    (
        "fused_single_qkv_rope",
        True,
        "model.transformer_config.fused_single_qkv_rope is for sequences that are not packed, and all are here; "
        "remove it",
    ),
    (
        "use_ring_exchange_p2p",
        True,
        "model.transformer_config.use_ring_exchange_p2p is for builds of torch that have torch.distributed."
        "ring_exchange; remove it",
    ),
    (
        "moe_token_dispatcher_type",
        "allgather",
        "Megatron-Core refuses model.transformer_config.moe_token_dispatcher_type: Token dispatcher type: allgather "
        "does not support variable sequence length, please use alltoall dispatcher instead.",
    ),
]


@pytest.mark.parametrize(("option", "value", "sentence"), SENTENCES)
def test_a_refusal_names_field_and_remedy(option: str, value: Any, sentence: str):
    assert refusal({option: value}) == sentence


def test_parts_that_only_transformer_engine_has_are_refused_in_a_sentence():
    assert refusal({}, SPARSE, recompute=["moe_act"]) == (
        "Megatron-Core refuses model.recompute: moe_act in recompute_modules is only supported with moe_grouped_gemm."
    )


def test_with_transformer_engine_its_options_pass():
    options = {"fp8": "hybrid", "attention_backend": "flash", "tp_comm_overlap": False, "cp_comm_type": ["p2p", "a2a"]}
    checked = checked_options(options, TransformerConfig, transformer_impl="transformer_engine")
    assert checked == {**options, "attention_backend": AttnBackend.flash}


def test_an_option_that_only_sounds_like_a_function_is_the_users():
    assert why_owned("use_te_activation_func") is None
    assert why_owned("activation_func") is not None and why_owned("grad_scale_func") is not None


def test_tokens_come_in_blocks_where_they_are_multiplied_in_few_bits():
    config = built({})
    assert token_multiple(config) == 1
    config.fp8, config.fp8_recipe = "hybrid", "delayed"
    assert token_multiple(config) == 16
    config.fp8_recipe = "mxfp8"
    assert token_multiple(config) == 32
    config.fp8, config.fp4, config.fp4_recipe = None, "e2m1", "nvfp4"
    assert token_multiple(config) == 128
    assert config.params_dtype == torch.float32


def test_fused_gradient_accumulation_is_refused_without_its_kernel():
    """Megatron-Core says so where the model is built, long after `validate`."""
    assert refusal({"gradient_accumulation_fusion": True}) == (
        "model.transformer_config.gradient_accumulation_fusion=true needs a GPU and Apex's kernel for it, which this "
        "machine lacks; remove it: where both are there, it is on"
    )
    assert built({"gradient_accumulation_fusion": False}).gradient_accumulation_fusion is False
