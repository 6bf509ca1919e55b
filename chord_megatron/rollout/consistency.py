"""Whether a sampler computes what the trainer computes, asked after every change of its weights."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

from chord_megatron.system.errors import UserError

Scores = Sequence[Sequence[float]]  # log-probs of each probe's tokens but its first


def largest_mean_difference(expected: Scores, scores: Mapping[str, Scores]) -> tuple[float, str]:
    """Mean |difference| of the log-probs of the engine where it is largest, and which that is; (0, "") of none.

    NaN counts as infinite.
    """
    return max(((_mean_difference(expected, own), name) for name, own in scores.items()), default=(0.0, ""))


def _mean_difference(expected: Scores, scores: Scores) -> float:
    mean = statistics.fmean(
        abs(a - b) for ours, theirs in zip(expected, scores, strict=True) for a, b in zip(ours, theirs, strict=True)
    )
    return math.inf if math.isnan(mean) else mean


def check_consistency(
    difference: float, engine: str, *, threshold: float, version: int, action: Literal["stop", "warn"]
) -> None:
    """Raises UserError (or warns) where the mean difference is above the threshold, or NaN."""
    if difference <= threshold:
        return
    message = (
        f"{engine} and the trainer disagree about weights of version {version}: log-probs of the probes differ by "
        f"{difference:.3g} on average, above rollout.consistency_threshold={threshold:g}; the update went wrong, or "
        "the two compute in different precision: compare model.dtype, or raise the threshold"
    )
    if action == "stop":
        raise UserError(message)
    warnings.warn(message, stacklevel=2)
