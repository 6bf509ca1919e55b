"""Context parallelism of the local model: each rank's queries against the keys and values of all.

Every rank has two chunks of each sequence (`batching/context_parallel.py`). Keys and values are gathered before the
attention and their gradients summed and scattered after it, as Llama 3 does (arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from chord_megatron.backend.attention import SDPACoreAttention, causal_attention, places_by_form, segments_of


class ContextCoreAttention(SDPACoreAttention):
    """SDPACoreAttention of packed sequences that are spread over a group of ranks. Decoding is each rank's own."""

    def __init__(self, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """See SDPACoreAttention."""
        if packed_seq_params is None:
            return super().forward(query, key, value, *args, **kwargs)
        bounds = packed_seq_params.cu_seqlens_q // self._group.size()  # Megatron-Core is told those of whole sequences
        return context_attention(query, key, value, bounds, self._group, self._softmax_scale)


def context_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup, scale: float | None = None
) -> Tensor:
    """Causal attention of each whole sequence, for this rank's tokens of it. A collective call.

    query, key, value: [tokens, heads, head], of this rank; keys may have fewer heads. cu_seqlens: bounds of this rank's
    share of each sequence, two chunks of one length. Returns [tokens, heads * value's head].
    """
    rank, size = group.rank(), group.size()
    both = torch.cat([key, value], dim=-1)  # one message instead of two
    gathered = gather_from_sequence_parallel_region(both, group=group)  # [size * tokens, ...]
    keys, values = gathered.split([key.shape[-1], value.shape[-1]], dim=-1)
    of_rank = len(query) * torch.arange(size, device=query.device)[:, None, None]
    rows, outputs = [], []
    for row, _ in places_by_form(segments_of(cu_seqlens), query.device):
        early, late = (of_rank + row).chunk(2, dim=-1)  # [size, sequences, chunk]
        whole = torch.cat([*early, *late.flip(0)], dim=-1)  # [sequences, length]: the places in the order of the tokens
        k, v = keys[whole].transpose(1, 2), values[whole].transpose(1, 2)
        for number, own in zip((rank, 2 * size - 1 - rank), row.chunk(2, dim=-1)):
            end = (number + 1) * own.shape[-1]
            output = causal_attention(query[own].transpose(1, 2), k[:, :, :end], v[:, :, :end], scale)
            rows.append(own.flatten())
            outputs.append(output.transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(outputs)[torch.cat(rows).argsort()]
