"""For workers that try several parallel layouts in one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core import parallel_state

from chord_megatron.backend.groups import ParallelGroups, initialize_distributed
from chord_megatron.config import ParallelConfig


def lay_out(settings: Mapping[str, Any]) -> tuple[ParallelConfig, ParallelGroups]:
    """The groups of a layout, in place of those of an earlier one."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel = ParallelConfig(**settings)
    return parallel, initialize_distributed(parallel, seed=0)
