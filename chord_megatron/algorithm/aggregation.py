"""What a token counts in the mean of its stream. Under `paper` all counts are of the whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "fixed_length"]


@dataclass(frozen=True)
class Mean:
    """The mean of a stream.

    token_mean: 1/tokens. sequence_mean: the mean of sequence means. sequence_sum: 1/sequences, the mean of sums.
    fixed_length: 1/(sequences * max_completion_length) (Dr. GRPO, arXiv 2503.20783).

    rows: None takes the mean over the step; a number, over each so many rows, as trainers do whose loss is that of a
    micro-batch, and then the mean of these: every one alike, or `by_rows` each by how many rows it has. scale
    multiplies the weights.
    """

    aggregation: Aggregation = "token_mean"
    max_completion_length: int = 0
    rows: int | None = None
    by_rows: bool = False
    scale: float = 1.0


def aggregation_weights(lengths: Sequence[int], mean: Mean) -> list[float]:
    """The weight of each token of each sequence; summed over all tokens the loss becomes the stream's mean.

    lengths: loss tokens of every sequence of the stream in the step (0 = filtered out).
    """
    rows = mean.rows or max(1, len(lengths))
    parts = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
    shares = [mean.scale * (len(part) / len(lengths) if mean.by_rows else 1 / len(parts)) for part in parts]
    return [*chain(*(_weights_within(part, mean, share) for part, share in zip(parts, shares)))]


def _weights_within(lengths: Sequence[int], mean: Mean, share: float) -> list[float]:
    num_sequences = sum(length > 0 for length in lengths)
    if not sum(lengths):
        return [0.0] * len(lengths)
    match mean.aggregation:
        case "token_mean":
            return [share / sum(lengths)] * len(lengths)
        case "sequence_mean":
            return [share / (num_sequences * length) if length else 0.0 for length in lengths]
        case "sequence_sum":
            return [share / num_sequences] * len(lengths)
        case "fixed_length":
            return [share / (num_sequences * mean.max_completion_length)] * len(lengths)
