"""Advantages of completions from the rewards of a generation batch, the completions of a prompt side by side.

A reward is NaN where the completion could not be scored: it is left out of every statistic and has the advantage 0.
So has a group without two different rewards, exactly. Whatever is taken over the batch is taken over the whole
generation batch, also where several optimizer steps share it: no rank and no step sees other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

AdvantageEstimator = Literal["grpo", "rloo", "reinforce_plus_plus", "opo", "pass_at_k"]
Scale = Literal["group", "batch", "none", "gdpo"]
EPS = 1e-6  # verl's and Trinity's; TRL and ms-swift have 1e-4


def less_mean(rewards: Tensor, lengths: Tensor) -> Tensor:
    """r - mean of the group (GRPO, arXiv 2402.03300, section 4.1)."""
    return rewards - rewards.nanmean(dim=1, keepdim=True)


def leave_one_out(rewards: Tensor, lengths: Tensor) -> Tensor:
    """r - mean of the others in the group = K / (K - 1) (r - mean) (RLOO, arXiv 2402.14740)."""
    others = (_count(rewards, dim=1) - 1).clamp(min=1).to(rewards.dtype)
    return (others + 1) / others * less_mean(rewards, lengths)


def less_length_weighted_mean(rewards: Tensor, lengths: Tensor) -> Tensor:
    """r - sum(length r) / sum(length), the baseline of least variance (OPO, arXiv 2505.23585)."""
    counted = torch.where(rewards.isnan(), 0.0, lengths)
    return rewards - (counted * rewards).nansum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True).clamp(min=1)


def best_over_second(rewards: Tensor, lengths: Tensor) -> Tensor:
    """The best of the group gets what it is above the second best, the others 0 (pass@k, arXiv 2503.19595)."""
    known = torch.where(rewards.isnan(), -torch.inf, rewards)
    best, second = known.topk(2, dim=1).values.split(1, dim=1)
    return torch.where(known == best, best - second, 0.0)


class Estimator(NamedTuple):
    """`unscaled(rewards, lengths)`, [groups, K] each, returns the same shape."""

    unscaled: Callable[[Tensor, Tensor], Tensor]
    scales: tuple[Scale, ...]  # what makes sense with it, its usual one first
    is_whitened: bool = False  # divided by the std of the unscaled advantages, not of the rewards


# The scales are ms-swift's (grpo_trainer.py) and verl's (core_algos.py).
ESTIMATORS: Mapping[AdvantageEstimator, Estimator] = {
    "grpo": Estimator(less_mean, ("group", "batch", "none", "gdpo")),
    "rloo": Estimator(leave_one_out, ("none", "group", "batch")),
    # The form with the group's baseline (arXiv 2501.03262), as ms-swift's.
    "reinforce_plus_plus": Estimator(less_mean, ("batch", "group", "none"), is_whitened=True),
    "opo": Estimator(less_length_weighted_mean, ("none",)),
    "pass_at_k": Estimator(best_over_second, ("group", "none")),
}


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    *,
    estimator: AdvantageEstimator = "grpo",
    scale: Scale = "group",
    lengths: Tensor | None = None,
    eps: float = EPS,
) -> Tensor:
    """The advantage of each completion, divided by std + eps (unbiased) of its group, of the batch, or not at all.

    rewards, lengths (in tokens; for `opo`): [num_prompts * num_generations]. Returns the shape and dtype of rewards.
    """
    assert rewards.is_floating_point() and scale != "gdpo"
    if num_generations == 1:
        return torch.zeros_like(rewards)
    groups = rewards.double().view(-1, num_generations)
    how = ESTIMATORS[estimator]
    tokens = torch.ones_like(groups) if lengths is None else lengths.double().view(-1, num_generations)
    advantages = how.unscaled(groups, tokens)
    measured = advantages if how.is_whitened else groups
    match scale:
        case "group":
            advantages = advantages / (_std(measured, dim=1) + eps)
        case "batch":
            advantages = advantages / (_std(measured.reshape(1, -1), dim=1) + eps)
    return _where_it_differs(groups, advantages).view(-1).to(rewards.dtype)


def gdpo_advantages(rewards: Tensor, weights: Sequence[float], num_generations: int, *, eps: float = 1e-8) -> Tensor:
    """Each function's rewards normalised in their group, weighted, summed, and normalised over the batch.

    rewards: [functions, completions]; a function that scores nothing of a group adds nothing there. A completion for
    which all are NaN is unscorable. Returns [completions]. GDPO (arXiv 2601.05242); eps as in ms-swift.
    """
    parts = [
        weight * group_advantages(row, num_generations, eps=eps).double()
        for weight, row in zip(weights, rewards, strict=True)
    ]
    is_scored = ~rewards.isnan().all(dim=0)
    total = torch.where(is_scored, torch.stack(parts).sum(dim=0), torch.nan)
    centred = total - total.nanmean()
    advantages = centred / (_std(total[None], dim=1)[0] + eps)
    # A group to which no function gives two rewards keeps its 0, whatever rounding leaves of the mean.
    teaches = torch.stack(parts).view(len(parts), -1, num_generations).ne(0).any(dim=2).any(dim=0)
    teaches = is_scored & teaches.repeat_interleave(num_generations)
    return torch.where(teaches, advantages, 0.0).to(rewards.dtype)


def zero_std_fraction(rewards: Tensor, num_generations: int) -> float:
    """The share of groups without two different rewards: they teach the policy nothing."""
    return 1 - _differs(rewards.view(-1, num_generations)).double().mean().item()


def _where_it_differs(groups: Tensor, advantages: Tensor) -> Tensor:
    """0 in groups without two different rewards, and where there is none.

    Tested on the rewards and not on the std: rounding of the mean can leave a std of 1e-17.
    """
    return torch.where(_differs(groups) & ~groups.isnan(), advantages, 0.0)


def _differs(groups: Tensor) -> Tensor:
    """[groups, 1] bool: whether a group has two different rewards."""
    lowest = torch.where(groups.isnan(), torch.inf, groups).amin(dim=1, keepdim=True)
    return lowest < torch.where(groups.isnan(), -torch.inf, groups).amax(dim=1, keepdim=True)


def _count(values: Tensor, dim: int) -> Tensor:
    return (~values.isnan()).sum(dim, keepdim=True)


def _std(values: Tensor, dim: int) -> Tensor:
    """Unbiased, of the values that are not NaN, with `dim` kept; NaN where there are fewer than two."""
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (_count(values, dim) - 1)).sqrt()
