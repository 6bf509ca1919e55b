"""Keys of config.json that no computation of logits reads, and values that are as good as none.

Collected from transformers' PreTrainedConfig and GenerationConfig, whose attributes old releases wrote into every
config.json, and from checkpoints of the supported families on the hub.
"""

from __future__ import annotations

from typing import Any

# Why nobody who computes logits reads them -> the keys, whatever they say.
_HARMLESS_BY_REASON = {
    "where it comes from": """
        _commit_hash _name_or_path _model_name_or_path architectures auto_map is_llama_config model_type torch_dtype
        dtype transformers_version transformers.js_config unsloth_fixed unsloth_version""",
    "how it is run: kernels, caches, memory, parallel plans": """
        _attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation
        _experts_implementation_internal _flash_attn_2_enabled use_flash_attn use_flash_attention
        use_flash_attention_2 base_model_tp_plan base_model_pp_plan chunk_size_feed_forward gradient_checkpointing
        keys_to_ignore_at_inference low_cpu_mem_usage torchscript use_bfloat16 use_cache""",
    "what a call returns": """
        _output_attentions output_attentions output_hidden_states output_logits output_scores return_dict
        return_dict_in_generate use_return_dict""",
    "how it generates, which the run's own keys say": """
        bad_words_ids begin_suppress_tokens cache_implementation decoder_start_token_id diversity_penalty do_sample
        early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
        forced_eos_token_id length_penalty max_length max_new_tokens min_length min_new_tokens min_p
        no_repeat_ngram_size num_beam_groups num_beams num_return_sequences penalty_alpha remove_invalid_values
        renormalize_logits repetition_penalty suppress_tokens temperature top_k top_p typical_p""",
    "the tokenizer's": """
        bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id prefix tokenizer_class model_max_length
        max_sequence_length tokenizer_model_max_length tokenizer_padding_side""",
    "of other heads and of training": """
        finetuning_task id2label initializer_range is_decoder label2id num_labels problem_type
        task_specific_params tf_legacy_loss""",
}
HARMLESS = frozenset(key for keys in _HARMLESS_BY_REASON.values() for key in keys.split())

# Key -> the value with which a model computes what it would without the key.
NEUTRAL: dict[str, Any] = {
    "activation": "swiglu",  # Falcon3, beside hidden_act
    "embedding_multiplier": 1,
    "hidden_activation": "silu",
    "logit_scale": 1,
    "logits_scaling": 1,
    "partial_rotary_factor": 1,
    "residual_multiplier": 1,
    "rotary_pct": 1,
}

_UNQUANTIZED = "use the unquantized checkpoint"
REMEDIES = {
    "quantization_config": _UNQUANTIZED,
    "compression_config": _UNQUANTIZED,
    "quantization": _UNQUANTIZED,  # of MLX
    "sliding_window": "use a model with full attention",
    "use_sliding_window": "use a model with full attention (use_sliding_window: false)",
}


def is_harmless(key: str, value: Any) -> bool:
    """Whether a key that nothing models may say this: a key of the tables, or one that is switched off."""
    return not value or key in HARMLESS or (key in NEUTRAL and value == NEUTRAL[key])
