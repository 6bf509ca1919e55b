"""Whether a model that config.json calls tied has an output layer of its own all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from chord_megatron.system.errors import UserError
from chord_megatron.weights.families.common import HF_EMBEDDING, HF_HEAD
from chord_megatron.weights.safetensors_io import SafetensorsReader

_NUMBERS_AT_ONCE = 2**22


def has_own_head(model_dir: Path) -> bool:
    """Whether the files hold both matrices and any number of them differs.

    That is when transformers does not tie them, whatever config.json says (modeling_utils.py, tie_weights, since 5).
    Weights that cannot be read decide nothing: whoever loads them says what is wrong.
    """
    try:
        with SafetensorsReader(model_dir) as reader:
            return reader.names() >= {HF_EMBEDDING, HF_HEAD} and not _are_equal(reader)
    except UserError:
        return False


def _are_equal(reader: SafetensorsReader) -> bool:
    shape = reader.spec(HF_EMBEDDING).shape
    if reader.spec(HF_HEAD).shape != shape:
        return False
    head, embedding = reader.get_slice(HF_HEAD), reader.get_slice(HF_EMBEDDING)
    step = max(1, _NUMBERS_AT_ONCE // max(1, *shape[1:]))
    return all(_same_numbers(head[i : i + step], embedding[i : i + step]) for i in range(0, shape[0], step))


def _same_numbers(one: Any, other: Any) -> bool:
    """Also of different dtypes: both become that of the model when they are loaded."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(dtype))
