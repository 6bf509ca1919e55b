"""Drawing the next token. Pure: logits and uniform numbers in, tokens out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from chord_megatron.system.errors import UserError

_SLICES, _SLICES_A_NAT = 1024, 64  # beyond 16 nats below the likeliest token is one slice of little mass


def uniform_numbers(seed: Sequence[int], count: int) -> Tensor:
    """`count` float64 numbers in [0, 1) that depend on `seed` only: one for each token of a completion."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))).random(count))


def seed_number(seed: Sequence[int]) -> int:
    """One 63-bit number out of `seed`, for engines that take no more."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)


def sample_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution at `uniforms`; temperature 0 takes the largest.

    logits: [batch, vocab], without padding columns. uniforms: [batch] in [0, 1).
    Returns tokens [batch] and their log-probs [batch] in float32, at the temperature but before top-p and top-k,
    which is what the trainer computes. At temperature 0 they are those of temperature 1.
    """
    log_probs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if log_probs.isnan().any():
        raise UserError(
            "the model's logits are not finite, so the weights have diverged; lower optimizer.lr and start again, "
            "or go on from an earlier checkpoint"
        )
    if temperature == 0:
        tokens = log_probs.argmax(dim=-1)
    elif top_p < 1 or top_k:
        tokens = _draw_from_first(log_probs, uniforms, top_p, top_k)
    else:
        tokens = _draw_from_all(log_probs, uniforms)
    return tokens, log_probs.gather(1, tokens[:, None]).squeeze(1)


def _draw_from_first(log_probs: Tensor, uniforms: Tensor, top_p: float, top_k: int) -> Tensor:
    """Tokens [batch] out of what top-k and top-p leave: prefixes of the tokens by falling probability."""
    # Stable, so that ties fall the same way everywhere.
    probabilities, order = log_probs.double().exp().sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    # Top-p is of what top-k leaves, as in transformers and vLLM; of equal tokens at its edge the lower ones stay,
    # as in vLLM's kernel for GPUs (v1/sample/ops/topk_topp_triton.py), where transformers keeps all of them.
    mass = cumulative[:, :top_k][:, -1:] if top_k else 1.0
    # The first token is always kept. At top_p = 1 all are, though float32 log-probs may sum to more than 1.
    keep = cumulative - probabilities < (top_p * mass if top_p < 1 else torch.inf)
    keep[:, 0] = True
    if top_k:
        keep[:, top_k:] = False
    last = keep.sum(-1, keepdim=True) - 1
    # The mass is read off the same sums that are searched: a token of probability 0 is out of reach.
    position = torch.searchsorted(cumulative, uniforms[:, None] * cumulative.gather(1, last), right=True)
    return order.gather(1, position.clamp(max=last)).squeeze(1)


def _draw_from_all(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [batch]: those of `_draw_from_first` with nothing left out, by sorting a small part of the vocabulary.

    Tokens are dealt into slices by falling log-prob; the slice that the uniform number falls into is the one to sort.
    """
    probabilities = log_probs.double().exp()
    slices = ((log_probs.amax(-1, keepdim=True) - log_probs) * _SLICES_A_NAT).clamp(max=_SLICES - 1).long()
    mass = probabilities.new_zeros(len(slices), _SLICES).scatter_add_(1, slices, probabilities)
    ends = mass.cumsum(-1)
    target = uniforms[:, None] * ends[:, -1:]  # below the last end: numbers below 1 round to nothing else
    found = torch.searchsorted(ends, target, right=True)
    rows, tokens = ((slices == found) & (probabilities > 0)).nonzero(as_tuple=True)
    counts = rows.bincount(minlength=len(slices))[:, None]
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows, 0]
    members = tokens.new_zeros(len(slices), int(counts.max())).index_put_((rows, places), tokens)
    is_member = torch.arange(members.shape[1], device=rows.device) < counts
    sizes = torch.where(is_member, probabilities.gather(1, members), 0.0)
    sizes, order = sizes.sort(dim=-1, descending=True, stable=True)
    cumulative = (ends - mass).gather(1, found) + sizes.cumsum(-1)
    position = torch.searchsorted(cumulative, target, right=True).clamp(max=counts - 1)
    return members.gather(1, order.gather(1, position)).squeeze(1)
