"""Keys that public checkpoints carry in config.json: those that no model reads, and values that would matter."""

from __future__ import annotations

from typing import Any

import pytest

from chord_megatron.weights.hf_config import parse_config

BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 100,
}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
QWEN3_MOE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LLAMA = {"architectures": ["LlamaForCausalLM"]}

# Family, and what such checkpoints have beside what is read; of the hub's config.json files.
HARMLESS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a base model with its sampling": (LLAMA, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
    "every default of transformers 4": (
        LLAMA,
        {
            "add_cross_attention": False,
            "bad_words_ids": None,
            "begin_suppress_tokens": None,
            "cross_attention_hidden_size": None,
            "diversity_penalty": 0.0,
            "early_stopping": False,
            "encoder_no_repeat_ngram_size": 0,
            "exponential_decay_length_penalty": None,
            "finetuning_task": None,
            "forced_bos_token_id": None,
            "is_decoder": False,
            "is_encoder_decoder": False,
            "length_penalty": 1.0,
            "max_length": 20,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beam_groups": 1,
            "num_beams": 1,
            "num_return_sequences": 1,
            "output_attentions": False,
            "output_hidden_states": False,
            "output_scores": False,
            "prefix": None,
            "problem_type": None,
            "pruned_heads": {},
            "remove_invalid_values": False,
            "repetition_penalty": 1.0,
            "return_dict_in_generate": False,
            "sep_token_id": None,
            "suppress_tokens": None,
            "temperature": 1.0,
            "tf_legacy_loss": False,
            "tie_encoder_decoder": False,
            "tokenizer_class": "LlamaTokenizer",
            "top_k": 50,
            "top_p": 1.0,
            "torchscript": False,
            "typical_p": 1.0,
            "use_bfloat16": False,
        },
    ),
    "as a trainer saved it": (
        LLAMA,
        {"use_cache": False, "gradient_checkpointing": True, "_flash_attn_2_enabled": True},
    ),
    "Vicuna": (LLAMA, {"max_sequence_length": 2048, "model_max_length": 4096, "pad_token_id": 0}),
    "SmolLM2": (LLAMA, {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}),
    "Falcon3": (LLAMA, {"activation": "swiglu", "head_dim": 256}),
    "rotary factor": (LLAMA, {"partial_rotary_factor": 1.0}),
    "rotary factor in transformers 5": (
        LLAMA,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    ),
    "scales of one": (LLAMA, {"logit_scale": 1.0, "residual_multiplier": 1, "embedding_multiplier": 1.0}),
    "parallel plans": (QWEN3, {"base_model_tp_plan": {"layers.*": "colwise"}, "keys_to_ignore_at_inference": ["x"]}),
    "Qwen3-Coder": (QWEN3_MOE, {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}),
    "Qwen3 with dropout of none": (QWEN3, {"attention_dropout": 0.0, "hidden_dropout": 0.0}),
}
# A value, and the family that would compute something else with it.
MATTER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (LLAMA, {"partial_rotary_factor": 0.5}),
    (LLAMA, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    (LLAMA, {"rope_interleaved": True}),
    (LLAMA, {"activation": "gelu"}),
    (LLAMA, {"logit_scale": 0.5}),
    (LLAMA, {"residual_multiplier": 0.22}),
    (LLAMA, {"is_encoder_decoder": True}),
    (LLAMA, {"add_cross_attention": True}),
    (LLAMA, {"pruned_heads": {"0": [1]}}),
    (LLAMA, {"attention_dropout": 0.1}),
    (LLAMA, {"use_qk_norm": True}),
    (QWEN3, {"use_qk_norm": False}),
    (QWEN3_MOE, {"shared_expert_intermediate_size": 64}),
    (QWEN3_MOE, {"qkv_bias": True}),
]


@pytest.mark.parametrize("name", HARMLESS)
def test_keys_that_no_model_reads_change_nothing(name: str) -> None:
    family, keys = HARMLESS[name]
    expected = parse_config(BASE | family | {key: keys[key] for key in keys if key == "head_dim"})
    assert parse_config(BASE | family | keys) == expected


@pytest.mark.parametrize(("family", "keys"), MATTER, ids=lambda value: str(value) if "hidden_size" not in value else "")
def test_values_that_matter_are_refused(family: dict[str, Any], keys: dict[str, Any]) -> None:
    key = "partial_rotary_factor" if "rope_parameters" in keys else next(iter(keys))
    with pytest.raises(ValueError, match=key):
        parse_config(BASE | family | keys)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_quantized_models_get_their_remedy_whatever_else_is_wrong(key: str) -> None:
    with pytest.raises(ValueError, match="use the unquantized checkpoint"):
        parse_config(BASE | LLAMA | {"some_scale": 2.0, key: {"bits": 4}})


# What no config.json holds that somebody wrote on purpose.
WRONG_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"architectures": "LlamaForCausalLM"}, "`architectures` must be a list of names"),
    ({"architectures": [5]}, "`architectures` must be a list of names"),
    ({"architectures": []}, "architecture none is not supported"),
    ({"num_hidden_layers": 2.5}, "`num_hidden_layers` must be a positive whole number, found 2.5"),
    ({"num_hidden_layers": "2"}, "`num_hidden_layers` must be a positive whole number, found '2'"),
    ({"num_hidden_layers": True}, "`num_hidden_layers` must be a positive whole number, found True"),
    ({"num_hidden_layers": 10**9}, "`num_hidden_layers` must be a positive whole number of up to 10000"),
    ({"vocab_size": 2**40}, "`vocab_size` must be a positive whole number of up to 2147483647"),
    ({"rms_norm_eps": float("nan")}, "`rms_norm_eps` must be a positive number, found nan"),
    ({"rms_norm_eps": float("inf")}, "`rms_norm_eps` must be a positive number, found inf"),
    ({"rope_theta": "10000"}, "`rope_theta` must be a positive number, found '10000'"),
    ({"rope_theta": -1}, "`rope_theta` must be a positive number, found -1"),
    ({"rope_scaling": {"rope_type": ["llama3"]}}, "of type \\['llama3'\\] is not supported"),
    ({"layer_types": 5}, "`layer_types` must be a list"),
    ({"layer_types": [["full_attention"]]}, "layer_types"),
    ({"tie_word_embeddings": "false"}, "`tie_word_embeddings` must be true or false, found 'false'"),
    ({"num_attention_heads": 128, "num_key_value_heads": 128}, "`head_dim` must be a positive whole number, found 0"),
]


@pytest.mark.parametrize(("keys", "message"), WRONG_TYPES, ids=str)
def test_values_of_a_wrong_type_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(BASE | LLAMA | keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mlp_only_layers": 1}, "`mlp_only_layers` must be a list of layer numbers, found 1"),
        ({"mlp_only_layers": ["1"]}, r"`mlp_only_layers` must be a list of layer numbers, found \['1'\]"),
        ({"decoder_sparse_step": 0}, "`decoder_sparse_step` must be a positive whole number, found 0"),
        ({"norm_topk_prob": "yes"}, "`norm_topk_prob` must be true or false, found 'yes'"),
        ({"num_experts": 2.5}, "`num_experts` must be a positive whole number, found 2.5"),
    ],
)
def test_values_of_a_wrong_type_are_named_of_experts_too(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(BASE | QWEN3_MOE | keys)


def test_a_whole_number_may_be_written_with_a_point() -> None:
    arch = parse_config(BASE | LLAMA | {"hidden_size": 64.0})
    assert arch.hidden_size == 64 and type(arch.hidden_size) is int
