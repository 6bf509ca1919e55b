"""What a torch_dist checkpoint holds beside its tensors: Megatron-Core's "common state", wherever a release puts it.

Up to megatron-core 0.18 it is the file common.pt; since 0.19 a bytes entry of the .distcp files, a list of one dict
(serialization.py, load_common_state_dict).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from chord_megatron.checkpoints.bounded_pickle import check_tensors
from chord_megatron.checkpoints.metadata import COMMON_STATE, cause_of, read_metadata
from chord_megatron.system.errors import UserError

_FILE = "common.pt"


def common_state_bytes(directory: Path, remedy: str) -> bytes | None:
    """What `torch.save` wrote, None where there is none. UserError where it is damaged, with `remedy`."""
    if (directory / _FILE).is_file():
        return (directory / _FILE).read_bytes()
    if not (directory / ".metadata").is_file():
        return None
    metadata = read_metadata(directory, remedy)
    if COMMON_STATE not in metadata.state_dict_metadata:
        return None
    info = (metadata.storage_data or {}).get(MetadataIndex(COMMON_STATE))
    if not isinstance(info, _StorageInfo) or Path(info.relative_path).name != info.relative_path:
        raise UserError(f"the .metadata file of {directory} is damaged; {remedy}")
    if info.transform_descriptors:
        raise UserError(
            f"{directory} stores {COMMON_STATE} transformed ({', '.join(info.transform_descriptors)}), "
            "which is not supported; save it without extensions"
        )
    try:
        with (directory / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            return file.read(min(info.length, (directory / info.relative_path).stat().st_size))
    except OSError as error:
        raise UserError(
            f"the checkpoint {directory} cannot be read ({info.relative_path}: {error.strerror}); {remedy}"
        ) from error


def read_common_state(directory: Path, remedy: str) -> dict[str, Any]:
    """The common state, of plain values and tensors. UserError where it is damaged or could run code."""
    content = common_state_bytes(directory, remedy)
    if content is None:
        raise UserError(f"{directory} has neither {_FILE} nor {COMMON_STATE}; {remedy}")
    try:
        check_tensors(io.BytesIO(content))
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles fail in every way there is
        cause = cause_of(error)
        raise UserError(f"the common state of {directory} is damaged or could run code ({cause}); {remedy}") from error
    state = unwrap_common_state(state)
    if not isinstance(state, dict):
        raise UserError(f"the common state of {directory} is damaged (it is no dictionary); {remedy}")
    return state


def unwrap_common_state(state: Any) -> Any:
    """The dict in the list of one that an entry holds."""
    return state[0] if isinstance(state, list) and len(state) == 1 else state
