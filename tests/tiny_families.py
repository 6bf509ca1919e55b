"""A tiny random model of every family that is supported, made and saved by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 131  # padded to 256, half of which TP 2 puts on the second rank
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # No special tokens: transformers does not learn the embedding of padding, and generation is told where to stop.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
_QWEN3_MOE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# name -> (configuration, model, settings); the part before "-" is the family.
MODELS: dict[str, tuple[type, type[PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),  # not hidden_size / num_attention_heads
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**_QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3_moe-mixed": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**_QWEN3_MOE, "mlp_only_layers": [2]}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM, {**_DEEPSEEK, "rope_parameters": YARN_ROPE}),
    "deepseek_v3-plain": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {**_DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    ),
}

WITH_EXPERTS = ("qwen3_moe", "mixtral", "deepseek_v3")  # what their names start with

# Parts of a layout, as fields of ParallelConfig.
TP_2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP_2 = {"pipeline_model_parallel_size": 2}
VPP_2 = {"virtual_pipeline_model_parallel_size": 2}
EP_2 = {"expert_model_parallel_size": 2}
CP_2 = {"context_parallel_size": 2}


def make_model(name: str, *, tied: bool = False, **changes: Any) -> PreTrainedModel:
    """A model in float32, always the same, with random norms and biases too, so that each tensor matters."""
    config_class, model_class, settings = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config_class(**_SIZES | settings | {"tie_word_embeddings": tied} | changes)).float()
        with torch.no_grad():
            for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if "inv_freq" not in tensor_name:
                    tensor.copy_(0.2 * torch.randn_like(tensor) + (tensor.ndim == 1))
    return model.eval()


def write_model(
    directory: Path, name: str, *, tied: bool = False, said_tied: bool = False, dtype: str = "float32", **changes: Any
) -> None:
    """Save a model as its publishers do: routers' biases stay float32.

    said_tied: its config.json says that it is tied although it has a head of its own.
    """
    model = make_model(name, tied=tied, **changes).to(getattr(torch, dtype))
    for tensor_name, tensor in model.named_buffers():
        if tensor_name.endswith("e_score_correction_bias"):
            tensor.data = tensor.data.float()
    model.save_pretrained(directory)
    if said_tied:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}), encoding="utf-8")
