"""Rollouts and expert answers as training samples: one kind of thing from here on. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chord_megatron.types import ExpertSample, Prompt, RolloutSample, TrainingSample


def rollout_training_samples(
    rollouts: Sequence[RolloutSample], advantages: Tensor, *, temperature: float, overlong_filter: bool
) -> list[TrainingSample]:
    """advantages: [rollouts]. `overlong_filter` takes completions without an end token out of the loss."""
    return [
        TrainingSample(
            tokens=rollout.tokens,
            loss_mask=rollout.response_mask & (not overlong_filter or rollout.finish_reason == "stop"),
            is_expert=False,
            temperature=temperature,
            advantage=advantage,
            rollout_log_probs=rollout.rollout_log_probs,
        )
        for rollout, advantage in zip(rollouts, advantages.tolist())
    ]


def expert_training_samples(experts: Sequence[ExpertSample]) -> list[TrainingSample]:
    """The answer and its end token are learnt, at temperature 1; the prompt is not."""
    return [
        TrainingSample(
            tokens=torch.tensor(expert.tokens),
            loss_mask=torch.arange(len(expert.tokens)) >= expert.prompt_length,
            is_expert=True,
            temperature=1.0,
            row=expert.id,
        )
        for expert in experts
    ]


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
