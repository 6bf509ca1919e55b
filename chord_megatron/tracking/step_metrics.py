"""The line of metrics.jsonl for one optimizer step. Pure: sums and samples in, a mapping out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from chord_megatron.algorithm.diagnosis import EXPERT_PHI, EXPERT_TOKENS, NUM_DECILES, in_deciles
from chord_megatron.algorithm.mu import gradient_share
from chord_megatron.algorithm.objective import Objective
from chord_megatron.types import (
    GlobalBatch,
    GradientComparison,
    LossTotals,
    Metrics,
    RoutingCounts,
    ScoredRollouts,
    TrainingSample,
)


class ExpertRow(NamedTuple):
    """What a step's forward pass says of an expert row that it trained on."""

    id: int  # row number
    log_prob: float  # mean of its answer tokens
    phi: float  # sum of p (1 - p) over them


def loss_metrics(totals: LossTotals, batch: GlobalBatch, objective: Objective, mu: float) -> Metrics:
    """Means from the metric sums of a step; None where a stream was empty."""
    sums = {**totals.sums, "clipped": totals.sums["clipped_low"] + totals.sums["clipped_high"]}
    run_tokens, expert_tokens = batch.num_run_rollout_tokens, batch.num_expert_tokens
    masks_sequences = objective.off_policy_delta is not None
    non_finite = int(sums["non_finite_rollout_log_probs"])
    compared_tokens = run_tokens - non_finite

    def rollout_mean(name: str) -> float | None:
        return sums[name] / run_tokens if run_tokens else None

    def expert_mean(name: str) -> float | None:
        return sums[name] / expert_tokens if expert_tokens else None

    def compared_mean(name: str) -> float | None:
        return sums[name] / compared_tokens if compared_tokens else None

    return {
        "loss": (1 - mu) * sums["loss_rollout"] + mu * sums["loss_expert"],
        "loss_rollout": sums["loss_rollout"],
        "loss_expert": sums["loss_expert"],
        "mu": mu,
        "phi_mean": expert_mean("phi"),
        "phi_mass": sums["phi"] if expert_tokens else None,
        "expert_entropy": expert_mean("expert_entropy"),
        "entropy": rollout_mean("entropy"),
        "kl": rollout_mean("kl") if objective.beta > 0 else None,
        "clip_fraction": rollout_mean("clipped"),
        "clip_fraction_low": rollout_mean("clipped_low"),
        "clip_fraction_high": rollout_mean("clipped_high"),
        "off_policy_masked_fraction": rollout_mean("off_policy_masked") if masks_sequences else None,
        "log_prob_diff_mean": compared_mean("log_prob_diff"),
        "log_prob_diff_max": totals.maxima["log_prob_diff"] if compared_tokens else None,
        "importance_weight_mean": compared_mean("importance_ratio"),
        "effective_sample_size": _effective_sample_size(sums, compared_tokens),
        "importance_clipped_fraction": rollout_mean("importance_clipped") if objective.importance is not None else None,
        "num_rollout_tokens": batch.num_rollout_tokens,
        "num_expert_tokens": expert_tokens,
        "skipped_rows": batch.num_idle_rows,
        "rank_imbalance": batch.imbalance,
        "non_finite_rollout_log_probs": non_finite,
        **_shares("expert_p", sums, EXPERT_TOKENS),
        **_shares("expert_phi", sums, EXPERT_PHI),
    }


def idle_row_fraction(totals: LossTotals, num_rollouts: int) -> float | None:
    """The share of a step's completions that teach nothing; None without completions."""
    active = sum(tokens > 0 for tokens in totals.rows["teaching_tokens"])
    return 1 - active / num_rollouts if num_rollouts else None


def router_metrics(counts: RoutingCounts | None) -> Metrics:
    """How evenly experts are used, and what routers would choose in place of replayed choices.

    None without experts, and where no row was run. The imbalance of a layer is MaxVio + 1 of arXiv 2408.15664: the
    tokens of its busiest expert over those of the mean.
    """
    keys = ("router_imbalance_mean", "router_imbalance_max", "router_replay_mismatch")
    if counts is None or not counts.load.any():
        return dict.fromkeys(keys)
    imbalances = (counts.load.amax(1) / counts.load.double().mean(1)).tolist()
    mismatch = counts.differing / counts.replayed if counts.replayed else None
    return dict(zip(keys, (statistics.fmean(imbalances), max(imbalances), mismatch), strict=True))


def gradient_metrics(gradients: GradientComparison | None, mu: float) -> Metrics:
    """Of a step at which the streams' gradients were compared; None where a stream was empty."""
    if gradients is None:
        return dict.fromkeys(("grad_norm_rollout", "grad_norm_expert", "gradient_cosine", "gradient_share"))
    return {
        "grad_norm_rollout": gradients.norm_a,
        "grad_norm_expert": gradients.norm_b,
        "gradient_cosine": gradients.cosine,
        "gradient_share": gradient_share(mu, gradients.norm_a, gradients.norm_b),
    }


def expert_rows(totals: LossTotals, experts: Sequence[TrainingSample]) -> list[ExpertRow]:
    """Of each expert row of a step; `experts` are its last samples."""
    first = len(totals.rows["phi"]) - len(experts)
    found = zip(experts, totals.rows["log_prob"][first:], totals.rows["phi"][first:])
    return [
        ExpertRow(sample.row, log_prob / sample.num_loss_tokens, phi)
        for sample, log_prob, phi in found
        if sample.row is not None and sample.num_loss_tokens
    ]


def rollout_metrics(scored: ScoredRollouts | None) -> Metrics:
    """Rewards and lengths of the completions of a step; None without completions."""
    if scored is None:
        keys = ("reward_mean", "reward_std", "reward_errors", "unscorable_completions", "zero_std_fraction")
        return dict.fromkeys((*keys, "response_length_mean", "truncated_fraction"))
    rollouts, rewards = scored.rollouts, _numbers(scored.rewards)
    return {
        "reward_mean": statistics.fmean(rewards) if rewards else None,
        "reward_std": statistics.pstdev(rewards) if rewards else None,
        "reward_errors": sum(scored.reward_errors),
        "unscorable_completions": len(scored.rewards) - len(rewards),
        "response_length_mean": statistics.fmean(int(rollout.response_mask.sum()) for rollout in rollouts),
        "truncated_fraction": statistics.fmean(rollout.finish_reason == "length" for rollout in rollouts),
        **{
            f"reward/{name}": statistics.fmean(numbers) if (numbers := _numbers(values)) else None
            for name, values in scored.rewards_by_function.items()
        },
        **_rewards_by_source(scored),
    }


def _rewards_by_source(scored: ScoredRollouts) -> Metrics:
    """Of a data set of several sources."""
    rewards: dict[str, list[float]] = {}
    for prompt, reward in zip(scored.prompts, scored.rewards, strict=True):
        if prompt.source:
            rewards.setdefault(prompt.source, []).extend(_numbers([reward]))
    return {f"reward_by_source/{name}": statistics.fmean(of) if of else None for name, of in sorted(rewards.items())}


def _numbers(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _shares(metric: str, sums: Mapping[str, float], name: str) -> Metrics:
    """METRIC/0.0 to METRIC/0.9: how much of a sum lies in each decile of p; None where it is empty or not finite."""
    parts = [sums[part] for part in in_deciles(name)]
    total = sum(parts)
    shares = [part / total if total > 0 else None for part in parts]
    return {f"{metric}/{decile / NUM_DECILES:.1f}": share for decile, share in enumerate(shares)}


def _effective_sample_size(sums: Mapping[str, float], tokens: int) -> float | None:
    """(sum w)^2 / (N sum w^2) in (0, 1], of the ratios as they are: 1 where sampler and trainer agree (Kong, 1992)."""
    if not tokens:
        return None
    share = sums["importance_ratio"] ** 2 / (tokens * sums["importance_ratio_squared"])
    return min(share, 1.0)  # rounding may pass it
