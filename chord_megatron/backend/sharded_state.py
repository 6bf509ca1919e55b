"""Reading the tensors of a distributed checkpoint, whichever release of Megatron-Core wrote it, and setting them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import ShardedBase, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

# How torch and Megatron-Core say that a checkpoint is damaged, or another model's.
READ_ERRORS = (OSError, ValueError, RuntimeError, CheckpointingException, CheckpointException)


def load_sharded(state: dict[str, Any], directory: Path, common: dict[str, Any]) -> dict[str, Any]:
    """What dist_checkpointing.load does (serialization.py), but it is handed the common state. Collective.

    That function reads the common state where its own release puts it, and since 0.19 lets torch unpickle it.
    `state` holds no objects (as against tensors): these are unpickled, too.
    """
    state, rest, factories = load_preprocess(state)
    loaded = merge(common, rest)
    state, _ = extract_matching_values(state, lambda value: isinstance(value, ShardedBase))
    return apply_factory_merges(merge(loaded, TorchDistLoadShardedStrategy().load(state, directory)), factories)


def set_weights(model: torch.nn.Module, weights: dict[str, Any]) -> None:
    """Load a state dict without TransformerEngine's extra states, which are objects: neither written nor read."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [name for name in missing if not name.endswith("_extra_state")] + unexpected
    assert not wrong, wrong
