"""Numerical primitives without any knowledge of models or training."""

from chord_megatron.ops.linear_log_probs import linear_log_probs
from chord_megatron.ops.vocab_parallel import vocab_parallel_log_probs

__all__ = ["linear_log_probs", "vocab_parallel_log_probs"]
