"""Hugging Face <-> Megatron tensor mapping, a table for each model family. Pure: no Megatron here."""
