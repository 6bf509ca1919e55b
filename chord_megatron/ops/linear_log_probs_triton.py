"""The two element-wise steps of a tile of logits as one Triton kernel each; see linear_log_probs_torch.py.

Each reads the tile once. A program works on one row (statistics: no atomics, so that results do not vary from run
to run) or on one row and one piece of its columns (gradients). Triton reads annotations, hence the kernels have
only its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 4096  # columns a program holds in registers at once
_NUM_WARPS = 8


def add_statistics(
    tile: Tensor, statistics: Tensor, targets: Tensor, temperatures: Tensor | None, scratch: Tensor, *, entropy: bool
) -> None:
    """Take the tile into the running `statistics` [4, rows]: m, s, b, y of vocab_parallel.py; b only for entropy."""
    rows, columns = tile.shape
    _statistics_kernel[(rows,)](
        tile,
        statistics,
        targets,
        tile if temperatures is None else temperatures,
        columns,
        tile.stride(0),
        statistics.stride(0),
        HAS_TEMPERATURES=temperatures is not None,
        ENTROPY=entropy,
        BLOCK=_block(columns),
        num_warps=_NUM_WARPS,
    )


def logit_gradients(
    tile: Tensor,
    maximum: Tensor,
    coefficients: tuple[Tensor, Tensor | None, Tensor],
    targets: Tensor,
    temperatures: Tensor | None,
    scratch: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """e^(z-m) (constant - slope (z-m)), plus `at_target` in the target's column, as `dtype`; lies in `scratch`."""
    constant, slope, at_target = coefficients
    rows, columns = tile.shape
    gradients = scratch.view(-1).view(dtype)[: rows * columns].view(rows, columns)
    block = _block(columns)
    _gradients_kernel[(rows, triton.cdiv(columns, block))](
        tile,
        gradients,
        maximum,
        constant,
        constant if slope is None else slope,
        at_target,
        targets,
        tile if temperatures is None else temperatures,
        columns,
        tile.stride(0),
        HAS_TEMPERATURES=temperatures is not None,
        HAS_SLOPE=slope is not None,
        BLOCK=block,
        num_warps=_NUM_WARPS,
    )
    return gradients


def _block(columns: int) -> int:
    return min(_MAX_BLOCK, triton.next_power_of_2(columns))


@triton.jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    tile,
    statistics,
    targets,
    temperatures,
    columns,
    row_stride,
    statistics_stride,
    HAS_TEMPERATURES: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits = tile + row.to(tl.int64) * row_stride
    maximum = tl.load(statistics + row)
    total = tl.load(statistics + statistics_stride + row)
    weighted = tl.load(statistics + 2 * statistics_stride + row)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        z = tl.load(logits + offsets, mask=inside, other=-float("inf"))
        if HAS_TEMPERATURES:
            z = z / tl.load(temperatures + row)
        new_maximum = tl.maximum(maximum, tl.max(z, axis=0))
        # The first tile meets m = -inf: a finite offset, because 0 * -inf is NaN. So is e^(-inf) * (-inf).
        offset = tl.maximum(maximum - new_maximum, -3.0e38)
        scale = tl.exp(offset)
        shifted = z - new_maximum
        exponentials = tl.exp(shifted)
        if ENTROPY:
            products = tl.where(inside, exponentials * shifted, 0.0)
            weighted = scale * (weighted + offset * total) + tl.sum(products, axis=0)
        total = scale * total + tl.sum(exponentials, axis=0)
        maximum = new_maximum
    tl.store(statistics + row, maximum)
    tl.store(statistics + statistics_stride + row, total)
    tl.store(statistics + 2 * statistics_stride + row, weighted)
    target = tl.load(targets + row)
    if (target >= 0) & (target < columns):
        z = tl.load(logits + target)
        if HAS_TEMPERATURES:
            z = z / tl.load(temperatures + row)
        tl.store(statistics + 3 * statistics_stride + row, z)


@triton.jit
def _gradients_kernel(  # type: ignore[no-untyped-def]
    tile,
    gradients,
    maxima,
    constants,
    slopes,
    at_targets,
    targets,
    temperatures,
    columns,
    row_stride,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    first = row.to(tl.int64) * row_stride
    z = tl.load(tile + first + offsets, mask=inside, other=0.0)
    if HAS_TEMPERATURES:
        z = z / tl.load(temperatures + row)
    shifted = z - tl.load(maxima + row)
    factor = tl.load(constants + row)
    if HAS_SLOPE:
        factor = factor - tl.load(slopes + row) * shifted
    gradient = tl.exp(shifted) * factor
    gradient += tl.where(offsets == tl.load(targets + row), tl.load(at_targets + row), 0.0)
    tl.store(gradients + first + offsets, gradient.to(gradients.dtype.element_ty), mask=inside)
