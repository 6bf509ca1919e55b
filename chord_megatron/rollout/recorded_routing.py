"""The routing of a completion as a line of a recording holds it: int16 of little-endian bytes, by zlib, in base64."""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chord_megatron.types import LIVE

_INT16 = np.dtype("<i2")


class RoutingForm(NamedTuple):
    """What a model's routing looks like."""

    num_layers: int  # with experts
    top_k: int
    num_experts: int


def encode(routing: Tensor) -> str:
    """routing: [tokens, layers, top k] int16."""
    return base64.b64encode(zlib.compress(routing.numpy().astype(_INT16).tobytes())).decode("ascii")


def decode(value: Any, num_tokens: int, form: RoutingForm) -> Tensor:
    """What `encode` was given. Raises ValueError saying what is wrong."""
    shape = (num_tokens, form.num_layers, form.top_k)
    content = _bytes(value, size=int(np.prod(shape)) * _INT16.itemsize)
    if content is None:
        raise ValueError(
            f"'routing' is not what a recording holds of {num_tokens} tokens with {form.top_k} experts in each of "
            f"{form.num_layers} layers"
        )
    routing = torch.from_numpy(np.frombuffer(content, _INT16).astype(np.int16)).view(shape)
    is_live = (routing == LIVE).all(-1)
    ranked = routing.sort(dim=-1).values
    is_chosen = (ranked[..., 0] >= 0) & (ranked[..., -1] < form.num_experts) & (ranked.diff(dim=-1) > 0).all(-1)
    if not (is_live | is_chosen).all():
        raise ValueError(f"'routing' names something else than {form.top_k} of the model's {form.num_experts} experts")
    return routing


def _bytes(value: Any, size: int) -> bytes | None:
    """As many as they should be, or None; never unpacks many more."""
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(value, validate=True), size + 1)
    except (TypeError, ValueError, binascii.Error, zlib.error):
        return None
    return content if len(content) == size and unpacker.eof else None
