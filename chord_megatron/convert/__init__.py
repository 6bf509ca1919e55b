"""Hugging Face <-> Megatron tensor mapping of dense Qwen2, Qwen3 and Llama models. Pure: no Megatron here."""
