"""Input checks of linear_log_probs: what does not fit is named with its numbers."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.bfloat16, torch.float32, torch.float64)
_DTYPES = {"targets": (torch.int64,), "valid": (torch.bool,), "temperature": _FLOATS}


def check_tensors(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor, valid: Tensor | None, total: int
) -> None:
    """ValueError unless shapes, types and devices fit together; `total`: tokens of the whole batch."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {[*hidden.shape]} and weight {[*weight.shape]} must be [tokens, H] and [columns, H]")
    # float16 would round most of the logits' gradients, of the size of a probability, to 0.
    if hidden.dtype != weight.dtype or hidden.dtype not in _FLOATS:
        raise ValueError(f"hidden ({hidden.dtype}) and weight ({weight.dtype}) must be one of {_FLOATS} alike")
    values = {"targets": targets, "valid": valid, "temperature": temperature}
    per_row = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    for name, value in per_row.items():
        if value.shape != (total,):
            raise ValueError(f"{name} {[*value.shape]} must have one entry for each of {total} tokens")
        if value.dtype not in _DTYPES[name]:
            raise ValueError(f"{name} is {value.dtype}, not one of {_DTYPES[name]}")
    devices = {name: value.device for name, value in {"hidden": hidden, "weight": weight, **per_row}.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"different devices: {', '.join(f'{name} on {device}' for name, device in devices.items())}")
