"""Log-probs and entropy from vocab-parallel logits: the full logits never exist on one rank.

Per row the statistics are m = max z, s = sum e^(z-m), b = sum e^(z-m) (z-m) and the target logit y. One
all-gather of [4, tokens] floats combines the shards, in rank order, so that every rank holds bitwise the same
result and the backward pass needs no communication:

    log_prob = y - M - log S          entropy = log S - B / S

    d log_prob / dz = 1_y - p         d entropy / dz = -p ((z - M) - B / S)      p = e^(z - M) / S
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_TOKENS = 1024  # rows worked on at once: the float32 copies of a chunk are the only extra memory


def vocab_parallel_log_probs(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row, both [tokens] in float32 (float64 for float64 logits).

    logits: [tokens, padded_vocab / TP], this rank's columns. targets: [tokens] int64, over the whole vocabulary.
    temperatures: [tokens], what each row's logits are divided by. vocab_size: columns from there on are padding
    and count as probability 0. tp_group: the ranks that share the vocabulary; None = one rank.
    """
    return _VocabParallelLogProbs.apply(logits, targets, temperatures, vocab_size, tp_group)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperatures: Tensor,
        vocab_size: int,
        tp_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        rank = 0 if tp_group is None else tp_group.rank()
        first_column = rank * logits.shape[1]
        num_columns = max(0, min(logits.shape[1], vocab_size - first_column))  # without padding
        local = torch.stack(
            [
                torch.cat(parts)
                for parts in zip(
                    *(
                        _statistics(z, targets[rows] - first_column)
                        for rows, z in _chunks(logits, temperatures, num_columns)
                    )
                )
            ]
        )
        maximum, total, weighted, target_logits = combine_shards(local, tp_group)
        ctx.save_for_backward(logits, targets, temperatures, maximum, total, weighted)
        ctx.first_column, ctx.num_columns = first_column, num_columns
        return target_logits - maximum - total.log(), total.log() - weighted / total

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, temperatures, maximum, total, weighted = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)
        for rows, z in _chunks(logits, temperatures, ctx.num_columns):
            shifted = z - maximum[rows, None]
            probabilities = shifted.exp() / total[rows, None]
            mean_shifted = (weighted[rows] / total[rows])[:, None]
            grad = probabilities * (-grad_log_probs[rows, None] - grad_entropy[rows, None] * (shifted - mean_shifted))
            columns, owned = owned_columns(targets[rows] - ctx.first_column, ctx.num_columns)
            if ctx.num_columns:
                grad.scatter_add_(1, columns[:, None], (grad_log_probs[rows] * owned)[:, None])
            grad_logits[rows, : ctx.num_columns] = grad / temperatures[rows, None]
        return grad_logits, None, None, None, None


def _chunks(logits: Tensor, temperatures: Tensor, num_columns: int) -> Any:
    """Row slices with their real columns as float32 (or float64) logits over temperature."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for start in range(0, logits.shape[0], _CHUNK_TOKENS):
        rows = slice(start, start + _CHUNK_TOKENS)
        yield rows, logits[rows, :num_columns].to(dtype) / temperatures[rows, None].to(dtype)


def _statistics(z: Tensor, local_targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(m, s, b, y) of one shard's rows, [rows] each; a shard that is all padding sends (-inf, 0, 0, 0)."""
    if z.shape[1] == 0:
        zeros = z.new_zeros(z.shape[0])
        return torch.full_like(zeros, -torch.inf), zeros, zeros, zeros
    maximum = z.max(dim=1).values
    shifted = z - maximum[:, None]
    exponentials = shifted.exp()
    columns, owned = owned_columns(local_targets, z.shape[1])
    target_logits = torch.where(owned, z.gather(1, columns[:, None]).squeeze(1), 0.0)
    return maximum, exponentials.sum(1), (exponentials * shifted).sum(1), target_logits


def owned_columns(local_targets: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """The column of each target on this shard (0 where it is another's) and whether the shard owns it."""
    owned = (local_targets >= 0) & (local_targets < num_columns)
    return torch.where(owned, local_targets, 0), owned


def combine_shards(local: Tensor, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Combine the shards' [4, tokens] statistics in rank order: the sums move to the global maximum."""
    if tp_group is None or tp_group.size() == 1:
        shards = local[None]
    else:
        gathered = [torch.empty_like(local) for _ in range(tp_group.size())]
        dist.all_gather(gathered, local, group=tp_group)
        shards = torch.stack(gathered)
    maxima, sums, weighted, targets = shards.unbind(1)
    maximum = maxima.max(dim=0).values
    offset = (maxima - maximum).clamp(min=torch.finfo(maxima.dtype).min)  # finite: 0 * -inf is NaN
    scale = offset.exp()
    return (
        maximum,
        (scale * sums).sum(0),
        (scale * (weighted + offset * sums)).sum(0),
        targets.sum(0),
    )
