"""Checkpoint formats on disk: metadata, torch_dist, Megatron-LM arguments, conversion. No megatron."""
