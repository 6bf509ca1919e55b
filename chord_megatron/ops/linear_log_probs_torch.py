"""The two element-wise steps of a tile of logits in plain torch, in place: for CPUs and for any other device.

Both destroy `tile`, the logits [rows, columns] of some rows and some columns of this rank's vocabulary, in float32
or float64, not yet divided by the temperatures [rows] (None = 1). targets: [rows] int64, relative to the tile's
first column. scratch: memory like that of `tile`. linear_log_probs_triton.py has the same two functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chord_megatron.ops.vocab_parallel import owned_columns


def add_statistics(
    tile: Tensor, statistics: Tensor, targets: Tensor, temperatures: Tensor | None, scratch: Tensor, *, entropy: bool
) -> None:
    """Take the tile into the running `statistics` [4, rows]: m, s, b, y of vocab_parallel.py; b only for entropy."""
    if temperatures is not None:
        tile.div_(temperatures[:, None])
    maximum, total, weighted, target_logits = statistics.unbind()
    columns, owned = owned_columns(targets, tile.shape[1])
    target_logits += torch.where(owned, tile.gather(1, columns[:, None]).squeeze(1), 0.0)
    new_maximum = torch.maximum(maximum, tile.amax(dim=1))
    # The first tile meets m = -inf: a finite offset, because 0 * -inf is NaN.
    offset = (maximum - new_maximum).clamp(min=torch.finfo(tile.dtype).min)
    scale = offset.exp()
    shifted = tile.sub_(new_maximum[:, None])
    exponentials = torch.exp(shifted, out=scratch)
    if entropy:
        weighted.add_(offset * total).mul_(scale).add_(shifted.mul_(exponentials).sum(dim=1))
    total.mul_(scale).add_(exponentials.sum(dim=1))
    maximum.copy_(new_maximum)


def logit_gradients(
    tile: Tensor,
    maximum: Tensor,
    coefficients: tuple[Tensor, Tensor | None, Tensor],
    targets: Tensor,
    temperatures: Tensor | None,
    scratch: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """e^(z-m) (constant - slope (z-m)), plus `at_target` in the target's column, as `dtype`.

    coefficients: (constant, slope, at_target), [rows] each; a slope of None counts as 0.
    """
    constant, slope, at_target = coefficients
    if temperatures is not None:
        tile.div_(temperatures[:, None])
    shifted = tile.sub_(maximum[:, None])
    if slope is None:
        gradients = shifted.exp_().mul_(constant[:, None])
    else:
        exponentials = torch.exp(shifted, out=scratch)
        gradients = torch.addcmul(constant[:, None], shifted, slope[:, None], value=-1, out=tile).mul_(exponentials)
    columns, owned = owned_columns(targets, tile.shape[1])
    gradients.scatter_add_(1, columns[:, None], (at_target * owned)[:, None])
    return gradients.to(dtype)
