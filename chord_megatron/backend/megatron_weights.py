"""A Megatron checkpoint's weights into this rank's model chunks, whatever the layout it was saved under."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping

from chord_megatron.backend.model import unwrap
from chord_megatron.backend.sharded_state import READ_ERRORS, load_sharded, set_weights
from chord_megatron.checkpoints.metadata import cause_of
from chord_megatron.checkpoints.reader import MegatronReader
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture


def load_megatron_weights(chunks: list[torch.nn.Module], directory: Path, arch: ModelArchitecture) -> None:
    """Fill every parameter of this rank, reading the chunks that it needs. Collective.

    Raises UserError as MegatronReader does, before anything is read.
    """
    reader = MegatronReader(directory, arch)
    metadata = vars(reader.form)
    state: dict[str, Any] = {
        str(index): unwrap(chunk).sharded_state_dict(metadata=dict(metadata)) for index, chunk in enumerate(chunks)
    }
    # Objects (as against tensors) are unpickled without checks; no weight is one.
    _, state = extract_matching_values(state, lambda value: isinstance(value, ShardedObject))
    apply_prefix_mapping(state, reader.renamed)
    try:
        loaded = load_sharded(state, reader.directory, {})
    except READ_ERRORS as error:
        raise UserError(
            f"the checkpoint {reader.directory} cannot be read ({cause_of(error)}); copy it again"
        ) from error
    for index, chunk in enumerate(chunks):
        set_weights(unwrap(chunk), loaded[str(index)])
