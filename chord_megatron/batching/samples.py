"""Rollouts and expert answers as training samples: one kind of thing from here on. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from chord_megatron.types import ExpertSample, Prompt, RolloutSample, TrainingSample


def rollout_training_samples(
    rollouts: Sequence[RolloutSample],
    advantages: Tensor,
    *,
    temperature: float,
    overlong_filter: bool,
    keeps_filtered: bool = False,
    rewards: Sequence[float] | None = None,
) -> list[TrainingSample]:
    """advantages: [rollouts]. A completion whose reward is NaN is no part of the loss.

    `overlong_filter` takes completions without an end token out of it, too; with `keeps_filtered` these count in the
    denominators, and weigh nothing.
    """
    is_scored = [True] * len(rollouts) if rewards is None else [not math.isnan(reward) for reward in rewards]
    is_kept = [not overlong_filter or rollout.finish_reason == "stop" for rollout in rollouts]
    return [
        TrainingSample(
            tokens=rollout.tokens,
            loss_mask=rollout.response_mask & (is_known and (stays or keeps_filtered)),
            is_expert=False,
            temperature=temperature,
            advantage=advantage,
            rollout_log_probs=rollout.rollout_log_probs,
            token_weights=float(stays),
            routing=rollout.routing,
        )
        for rollout, advantage, is_known, stays in zip(rollouts, advantages.tolist(), is_scored, is_kept, strict=True)
    ]


def most_uncertain(
    samples: Sequence[TrainingSample], entropies: Sequence[Tensor], share: float
) -> list[TrainingSample]:
    """Their policy loss only where the entropy is at or above its quantile 1 - share over all their loss tokens.

    Elsewhere the advantage is 0, so that denominators and KL penalty stay as they are (arXiv 2506.01939;
    `top_entropy_quantile` of TRL and ms-swift). entropies: [length] each.
    """
    counted = torch.cat([row[1:][sample.loss_mask[1:]] for sample, row in zip(samples, entropies)])
    if not len(counted):
        return list(samples)
    # As torch.quantile, which takes 2^24 numbers at most.
    place = (1 - share) * (len(counted) - 1)
    ranked, below = counted.double().sort().values, int(place)
    threshold = torch.lerp(ranked[below], ranked[min(below + 1, len(ranked) - 1)], place - below)
    return [replace(s, advantage=(row >= threshold) * s.advantage) for s, row in zip(samples, entropies)]


def expert_training_samples(experts: Sequence[ExpertSample], *, temperature: float = 1.0) -> list[TrainingSample]:
    """The answer and its end token are learnt; the prompt is not, nor what the data weigh with 0."""
    return [_expert_training_sample(expert, temperature) for expert in experts]


def _expert_training_sample(expert: ExpertSample, temperature: float) -> TrainingSample:
    mask, weights = torch.arange(len(expert.tokens)) >= expert.prompt_length, expert.token_weights
    return TrainingSample(
        tokens=torch.tensor(expert.tokens),
        loss_mask=mask if weights is None else mask & (torch.tensor(weights) > 0),
        is_expert=True,
        temperature=temperature,
        token_weights=1.0 if weights is None else torch.tensor(weights),
        row=expert.id,
    )


def probe_samples(prompts: Sequence[Prompt]) -> list[TrainingSample]:
    """Prompts whose every token but the first is scored, at temperature 1."""
    return [
        TrainingSample(
            tokens=torch.tensor(prompt.tokens),
            loss_mask=torch.arange(len(prompt.tokens)) > 0,
            is_expert=True,
            temperature=1.0,
        )
        for prompt in prompts
    ]
