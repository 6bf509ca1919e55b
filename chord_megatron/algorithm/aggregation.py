"""Aggregation weights: what a token counts in the mean of its stream. All counts are of the whole step."""

from collections.abc import Sequence
from typing import Literal

LossType = Literal["dapo", "grpo", "dr_grpo"]


def aggregation_weights(
    lengths: Sequence[int], loss_type: LossType = "dapo", *, max_completion_length: int = 0
) -> list[float]:
    """The weight of each token of each sequence; summed over all tokens the loss becomes the stream's mean.

    lengths: loss tokens of every sequence of the step (0 = filtered out).
    dapo: 1/N, the token mean. grpo: 1/(sequences * length), the mean of sequence means.
    dr_grpo: 1/(sequences * max_completion_length).
    """
    num_tokens = sum(lengths)
    num_sequences = sum(length > 0 for length in lengths)
    if num_tokens == 0:
        return [0.0] * len(lengths)
    if loss_type == "dapo":
        return [1.0 / num_tokens] * len(lengths)
    if loss_type == "grpo":
        return [1.0 / (num_sequences * length) if length else 0.0 for length in lengths]
    return [1.0 / (num_sequences * max_completion_length)] * len(lengths)
