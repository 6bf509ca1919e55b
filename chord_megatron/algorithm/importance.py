"""Importance weights of rollout tokens: the trainer's policy over the one that sampled them. Detached numbers only.

Tokens that other kernels, another precision or older weights sampled come from pi_sampler, not from the pi_old of the
clipped ratio; weights pi_old / pi_sampler correct for that. Names, sequence ratio, bounds and the range of the log
ratio are those of ms-swift (`rollout_importance_sampling_mode` in its grpo_trainer.py), which are sound:

- A sequence's ratio is the geometric mean of its tokens' ratios, as in NeMo-RL's "seq-mask-tis". The product, as in
  TRL and verl, is the unbiased one, but its logarithm grows with the length, so that one threshold cannot serve short
  and long completions; a preset may ask for it.
- `sequence_mask` decides by the sequence's ratio and weighs the tokens that stay by their own, without a bound
  (the same in NeMo-RL). `sequence_truncate` gives each token the sequence's ratio.
- There is an upper bound only: a small weight adds no variance that would need one. IcePop (slime, NeMo-RL) also drops
  tokens below a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from chord_megatron.algorithm.sequences import Sequences

ImportanceSamplingMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
SequenceRatio = Literal["mean", "product"]

# e^20 = 5e8: beyond any threshold of use, while its square summed over a step stays far inside float64.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class ImportanceCorrection:
    """How the ratios become weights; what equals the threshold is within it."""

    mode: ImportanceSamplingMode
    threshold: float
    sequence_ratio: SequenceRatio = "mean"


def log_importance_ratios(old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> Tensor:
    """log(pi_old / pi_sampler) of each token within +-MAX_LOG_RATIO. [tokens], returns float64.

    0 outside `mask`, and where the sampler recorded no finite number: one such token says nothing about the ratio, and
    must not cost the step. NaN of the trainer's own stays, so that the step is skipped.
    """
    difference = old_log_probs.detach().double() - rollout_log_probs.double()
    return torch.where(mask & rollout_log_probs.isfinite(), difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), 0.0)


def importance_weights(
    log_ratios: Tensor, mask: Tensor, sequences: Sequences, correction: ImportanceCorrection
) -> tuple[Tensor, Tensor]:
    """The weight of each token and whether the threshold changed it.

    log_ratios: [tokens] float64 of `log_importance_ratios`. mask: [tokens] bool, the tokens that count.
    Returns float64 and bool, [tokens].
    """
    level, bound = correction.mode.split("_")
    ratios = torch.exp(log_ratios)
    compared = ratios if level == "token" else torch.exp(_of_sequence(log_ratios, mask, sequences, correction))
    is_clipped = mask & (compared > correction.threshold)
    if bound == "truncate":
        return compared.clamp(max=correction.threshold), is_clipped
    return torch.where(is_clipped, 0.0, ratios), is_clipped


def _of_sequence(log_ratios: Tensor, mask: Tensor, sequences: Sequences, correction: ImportanceCorrection) -> Tensor:
    if correction.sequence_ratio == "mean":
        return sequences.mean(log_ratios, mask)
    return sequences.sum(log_ratios).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def off_policy_sequences(
    log_drift: Tensor, advantages: Tensor, mask: Tensor, sequences: Sequences, delta: float
) -> Tensor:
    """Sequences with a negative advantage that the policy has left: mean of log(pi_sampler / pi) above `delta`.

    What it would no longer say teaches it least (DeepSeek-V3.2, arXiv 2512.02556, section 3.1; TRL's
    `get_off_policy_mask`). log_drift: [tokens] float64 of `log_importance_ratios`, pi / pi_sampler. Returns bool,
    [tokens]. A sequence's advantage has the sign of the sum over its tokens.
    """
    is_negative = sequences.sum(torch.where(mask, advantages, 0.0)) < 0
    return mask & is_negative & (-sequences.mean(log_drift, mask) > delta)
