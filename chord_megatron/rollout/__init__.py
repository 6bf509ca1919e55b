"""Engines that draw completions. Only files named vllm_*.py import vllm."""
