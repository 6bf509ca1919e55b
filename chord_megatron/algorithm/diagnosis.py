"""What a training pass tells of its streams beside the loss: sums of a micro-batch, and sums of each sequence. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from chord_megatron.algorithm.expert_weights import phi
from chord_megatron.algorithm.sequences import Sequences
from chord_megatron.types import MicroBatch

NUM_DECILES = 10  # of p, the policy's probability of an expert token: [0, 0.1), ... [0.9, 1]
EXPERT_TOKENS, EXPERT_PHI = "expert_tokens", "expert_phi"  # a sum for each decile: `in_deciles`


def in_deciles(name: str) -> list[str]:
    """The names of a sum's parts, in the order of p."""
    return [f"{name}_{decile}" for decile in range(NUM_DECILES)]


def stream_sums(log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
    """Of the expert tokens: how many lie in each decile of p, their phi by decile, all phi, all entropy.

    log_probs, entropy: [tokens].
    """
    mask, log_probs = batch.expert_mask, log_probs.detach()
    of_phi = torch.where(mask, phi(log_probs, entropy).double(), 0.0)
    decile = (log_probs.exp() * NUM_DECILES).long().clamp(0, NUM_DECILES - 1)
    place = torch.where(mask, decile, NUM_DECILES)  # tokens of no expert behind the others
    empty = of_phi.new_zeros(NUM_DECILES + 1)
    tokens, masses = empty.index_add(0, place, mask.double()), empty.index_add(0, place, of_phi)
    return {
        "phi": of_phi.sum(),
        "expert_entropy": torch.where(mask, entropy.detach().double(), 0.0).sum(),
        **dict(zip(in_deciles(EXPERT_TOKENS), tokens)),
        **dict(zip(in_deciles(EXPERT_PHI), masses)),
    }


def row_sums(log_probs: Tensor, entropy: Tensor, batch: MicroBatch, sequences: Sequences) -> dict[str, Tensor]:
    """[sequences] float64 each: log_prob and phi, summed over the expert tokens, and the number of teaching tokens.

    Those are a rollout's that have a weight and an advantage; a completion without one teaches nothing.
    """
    mask, log_probs = batch.expert_mask, log_probs.detach()
    values = {
        "log_prob": torch.where(mask, log_probs.double(), 0.0),
        "phi": torch.where(mask, phi(log_probs, entropy).double(), 0.0),
        "teaching_tokens": (batch.rollout_weights * batch.advantages != 0).double(),
    }
    return {name: sequences.totals(value) for name, value in values.items()}
