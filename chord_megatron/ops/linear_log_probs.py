"""Log-probs and entropy of a vocabulary projection, without ever holding its logits.

The logits z = hidden @ weight.T / temperature exist one tile at a time. The forward pass keeps per row the
statistics m, s, b and y of vocab_parallel.py, combined over the vocabulary shards by one all-gather; the backward
pass makes each tile again and turns it into

    dL/dz = p (-g - g_H ((z - m) - b/s)) + g 1_y        p = e^(z - m) / s

with g = dL/d log_prob and g_H = dL/d entropy. Memory beside the results and gradients: two tiles and O(tokens).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from chord_megatron.ops.linear_log_probs_checks import check_tensors
from chord_megatron.ops.token_blocks import BlockGradients, TokenBlocks
from chord_megatron.ops.vocab_parallel import combine_shards
from chord_megatron.ops.weight_gradient import WeightGradient

# Tokens x vocabulary of a tile. CUDA: 32 MB of float32 logits stay in the L2 cache of an H100 (50 MB).
_TILES = {"cpu": (1024, 2048), "cuda": (2048, 4096)}


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    valid: Tensor | None = None,
    sequence_parallel: bool = False,
    compute_entropy: bool = True,
    save_logits_bytes: int = 0,
    implementation: Literal["torch", "triton"] | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target and entropy (nats) of each row's distribution softmax(hidden @ weight.T / temperature).

    hidden: [T, H], or under sequence_parallel this rank's [T / TP, H] rows, in order. weight: [V / TP, H], this
    rank's rows of the vocabulary. bfloat16, float32 or float64; sums, results and dW are float32 (float64 for
    float64). targets: [T] int64, over the whole vocabulary. vocab_size: rows of the weight from there on are
    padding and count as probability 0; None = no padding. temperature: one, or one per row [T]. valid: [T] bool,
    rows to compute; the others' results and gradients are 0. compute_entropy False: the entropy is None.

    Returns (log_probs [T], entropy [T]), bitwise equal on all ranks of tp_group. Their upstream gradients must be
    equal there, too; rows where they are 0 cost nothing. The gradient of hidden is summed over tp_group. That of
    a weight under Megatron-Core's DistributedDataParallel goes straight into its main_grad.

    save_logits_bytes: keep the logits for the backward pass where they take at most so much memory, which saves
    one of four matrix multiplications. implementation: None = Triton on NVIDIA GPUs, else torch. tile: tokens and
    columns of a tile; None = a default of the device.

    ValueError: shapes, types, devices or values that do not fit each other.
    """
    group_size = 1 if tp_group is None else tp_group.size()
    if vocab_size is None:
        vocab_size = weight.shape[0] * group_size
    total = hidden.shape[0] * (group_size if sequence_parallel else 1)
    check_tensors(hidden, weight, targets, temperature, valid, total)
    if not 0 < vocab_size <= weight.shape[0] * group_size:
        raise ValueError(f"vocab_size {vocab_size} is not within {weight.shape[0]} weight rows x {group_size} ranks")
    sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
    block_tokens, block_columns = tile or _TILES["cuda" if hidden.is_cuda else "cpu"]
    first_column = weight.shape[0] * (0 if tp_group is None else tp_group.rank())
    head = _Head(
        blocks=TokenBlocks(None, total, block_tokens, tp_group, sequence_parallel),
        targets=targets.contiguous(),
        temperatures=_per_row(temperature, total, sum_dtype, hidden.device),
        first_column=first_column,
        num_columns=max(0, min(weight.shape[0], vocab_size - first_column)),
        block_columns=block_columns,
        sum_dtype=sum_dtype,
        kernels=_kernels(implementation, hidden.device),
        compute_entropy=compute_entropy,
    )
    if valid is not None:
        head, _ = head.subset(valid)
    _check_values(head, vocab_size)
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    logits_bytes = head.blocks.count * head.num_columns * sum_dtype.itemsize
    return _LinearLogProbs.apply(hidden, weight, head, needs_gradient and logits_bytes <= save_logits_bytes)


@dataclass(frozen=True)
class _Head:
    """One projection: its rows that count, and how it is computed."""

    blocks: TokenBlocks
    targets: Tensor  # [rows that count], over the whole vocabulary
    temperatures: Tensor | None  # [rows that count]
    first_column: int  # of this rank's vocabulary
    num_columns: int  # without padding
    block_columns: int
    sum_dtype: torch.dtype
    kernels: ModuleType
    compute_entropy: bool

    def subset(self, keep: Tensor) -> tuple[_Head, Tensor | None]:
        """With only the rows where `keep` is true, and their positions among the present ones; None = all."""
        blocks, positions = self.blocks.subset(keep)
        temperatures = None if self.temperatures is None else _take(self.temperatures, positions)
        return replace(
            self, blocks=blocks, targets=_take(self.targets, positions), temperatures=temperatures
        ), positions

    def fetch(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows, as the matrix multiplications take them."""
        for block, rows in self.blocks.fetch(hidden):
            yield block, rows.to(self.operand_dtype(hidden))

    def columns(self) -> Iterator[slice]:
        for start in range(0, self.num_columns, self.block_columns):
            yield slice(start, min(start + self.block_columns, self.num_columns))

    def operand_dtype(self, hidden: Tensor) -> torch.dtype:
        """GPUs multiply bfloat16 into float32 sums; elsewhere the operands are converted first."""
        return hidden.dtype if hidden.is_cuda else self.sum_dtype

    def rows_of(self, block: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Targets relative to the first of `columns`, and temperatures, of a block of rows."""
        temperatures = None if self.temperatures is None else self.temperatures[block]
        return self.targets[block] - (self.first_column + columns.start), temperatures


class _Tile:
    """Memory for one tile of logits and as much scratch, used again for each."""

    def __init__(self, head: _Head, device: torch.device) -> None:
        size = min(head.blocks.block_tokens, head.blocks.count) * min(head.block_columns, head.num_columns)
        self._logits, self._scratch = torch.empty(2, size, dtype=head.sum_dtype, device=device).unbind()

    def shaped(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """(logits, scratch), [rows, columns] each."""
        size = rows * columns
        return self._logits[:size].view(rows, columns), self._scratch[:size].view(rows, columns)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, head: _Head, save_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        statistics = torch.zeros(4, head.blocks.count, dtype=head.sum_dtype, device=hidden.device)
        statistics[0] = -torch.inf
        saved = statistics.new_empty(head.blocks.count, head.num_columns) if save_logits else None
        memory = _Tile(head, hidden.device)
        for block, rows in head.fetch(hidden):
            for columns in head.columns():
                tile, scratch = memory.shaped(len(rows), columns.stop - columns.start)
                _multiply(tile, rows, weight[columns].to(rows.dtype).t())
                if saved is not None:
                    saved[block, columns] = tile
                head.kernels.add_statistics(
                    tile, statistics[:, block], *head.rows_of(block, columns), scratch, entropy=head.compute_entropy
                )
        maximum, total, weighted, target_logits = statistics = torch.stack(
            combine_shards(statistics, head.blocks.group)
        )
        ctx.save_for_backward(hidden, weight, statistics, saved)
        ctx.head = head
        ctx.set_materialize_grads(False)
        log_total = total.log()
        log_probs = head.blocks.spread(target_logits - maximum - log_total)
        return log_probs, head.blocks.spread(log_total - weighted / total) if head.compute_entropy else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, statistics, saved = ctx.saved_tensors
        head, maximum, coefficients, positions = _row_coefficients(ctx.head, statistics, grad_log_probs, grad_entropy)
        grad_hidden = BlockGradients(head.blocks, torch.zeros_like(hidden)) if ctx.needs_input_grad[0] else None
        grad_weight = WeightGradient(weight, head.sum_dtype) if ctx.needs_input_grad[1] else None
        memory = _Tile(head, hidden.device)
        for block, rows in head.fetch(hidden):
            grad_rows = torch.zeros(rows.shape, dtype=head.sum_dtype, device=rows.device)
            for columns in head.columns():
                tile, scratch = memory.shaped(len(rows), columns.stop - columns.start)
                weight_rows = weight[columns].to(rows.dtype)
                if saved is None:
                    _multiply(tile, rows, weight_rows.t())
                else:
                    tile.copy_(_take(saved[:, columns], block if positions is None else positions[block]))
                grad_logits = head.kernels.logit_gradients(
                    tile,
                    maximum[block],
                    tuple(c if c is None else c[block] for c in coefficients),
                    *head.rows_of(block, columns),
                    scratch,
                    rows.dtype,
                )
                if grad_hidden is not None:
                    _multiply(grad_rows, grad_logits, weight_rows, add=True)
                if grad_weight is not None:
                    _multiply(grad_weight.sums[columns], grad_logits.t(), rows, add=True)
            if grad_hidden is not None:
                grad_hidden.add(block, grad_rows)
        return (
            None if grad_hidden is None else grad_hidden.finish(),
            None if grad_weight is None else grad_weight.finish(),
            None,
            None,
        )


def _row_coefficients(
    head: _Head, statistics: Tensor, grad_log_probs: Tensor | None, grad_entropy: Tensor | None
) -> tuple[_Head, Tensor, tuple[Tensor | None, ...], Tensor | None]:
    """The rows with a gradient; their m, their (constant, slope, at_target) and their positions in `statistics`.

    dL/dz = e^(z-m) (constant - slope (z-m)) + at_target 1_y, temperature included.
    """
    maximum, total, weighted, _ = statistics
    constant, slope, at_target = torch.zeros_like(total), None, torch.zeros_like(total)
    has_gradient = torch.zeros_like(total, dtype=torch.bool)
    divisor = total if head.temperatures is None else total * head.temperatures
    if grad_log_probs is not None:
        g = _take(grad_log_probs, head.blocks.index).contiguous()  # that of a sum has strides of 0
        has_gradient |= g.ne(0)
        at_target = g if head.temperatures is None else g / head.temperatures
        constant = -g / divisor
    if grad_entropy is not None:
        g = _take(grad_entropy, head.blocks.index).contiguous()
        has_gradient |= g.ne(0)
        slope = g / divisor
        constant = constant + slope * (weighted / total)
    head, positions = head.subset(has_gradient)
    coefficients = tuple(None if c is None else _take(c, positions) for c in (constant, slope, at_target))
    return head, _take(maximum, positions), coefficients, positions


def _multiply(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """out = left @ right, or out += left @ right, where `out` may be float32 and the operands bfloat16."""
    beta = 1.0 if add else 0.0  # with 0, what `out` held is not read
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=beta, out=out)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=beta, out=out)


def _take(values: Tensor, positions: Tensor | slice | None) -> Tensor:
    return values if positions is None else values[positions]


def _kernels(implementation: str | None, device: torch.device) -> ModuleType:
    if implementation not in (None, "torch", "triton"):
        raise ValueError(f"implementation {implementation!r} is neither 'torch' nor 'triton'")
    has_triton = find_spec("triton") is not None
    if implementation == "triton" and not has_triton:
        raise ValueError("implementation 'triton' needs the package triton, which is not installed")
    if implementation is None:
        implementation = "triton" if device.type == "cuda" and has_triton else "torch"
    return import_module(f"chord_megatron.ops.linear_log_probs_{implementation}")


def _per_row(temperature: float | Tensor, total: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """[total], None where it is 1."""
    if isinstance(temperature, Tensor):
        return temperature.to(dtype).contiguous()
    return None if temperature == 1.0 else torch.full((total,), temperature, dtype=dtype, device=device)


def _check_values(head: _Head, vocab_size: int) -> None:
    """Only the rows that count, because the others may hold anything, such as -100."""
    if head.blocks.count == 0:
        return
    low, high = torch.stack(torch.aminmax(head.targets)).tolist()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"targets from {low} to {high} are not within the vocabulary of {vocab_size}")
    if head.temperatures is not None and not (lowest := head.temperatures.min().item()) > 0:
        raise ValueError(f"temperature {lowest} must be above 0")
