"""Rollouts, expert answers and prompts as training samples, by hand."""

from __future__ import annotations

import pytest
import torch

from chord_megatron.batching.samples import expert_training_samples, probe_samples, rollout_training_samples
from chord_megatron.types import ExpertSample, FinishReason, Prompt, RolloutSample


def rollout(tokens: tuple[int, ...], prompt_length: int, finish_reason: FinishReason) -> RolloutSample:
    """The log-prob of the token at t is -t / 4."""
    places = torch.arange(len(tokens))
    is_response = places >= prompt_length
    log_probs = torch.where(is_response, -places / 4, 0.0)
    return RolloutSample(0, 0, torch.tensor(tokens, dtype=torch.int32), is_response, log_probs, 0, finish_reason)


@pytest.mark.parametrize("overlong_filter", [False, True])
def test_rollouts_by_hand(overlong_filter: bool):
    rollouts = [rollout((11, 12, 13, 14), 2, "stop"), rollout((21, 22, 23), 1, "length")]
    advantages = torch.tensor([0.75, -1.5], dtype=torch.float64)
    first, second = rollout_training_samples(rollouts, advantages, temperature=0.6, overlong_filter=overlong_filter)
    assert first.tokens.tolist() == [11, 12, 13, 14] and second.tokens.tolist() == [21, 22, 23]
    assert first.loss_mask.dtype == second.loss_mask.dtype == torch.bool
    assert first.loss_mask.tolist() == [False, False, True, True]
    # Without an end token the filter takes the whole completion out of the loss.
    assert second.loss_mask.tolist() == [False, not overlong_filter, not overlong_filter]
    assert (first.advantage, second.advantage) == (0.75, -1.5)
    assert first.rollout_log_probs.tolist() == [0.0, 0.0, -0.5, -0.75]
    assert second.rollout_log_probs.tolist() == [0.0, -0.25, -0.5]
    for sample in (first, second):
        assert (sample.is_expert, sample.temperature) == (False, 0.6)
        assert sample.rollout_log_probs.dtype == torch.float32
        assert sample.old_log_probs is None and sample.ref_log_probs is None


def test_expert_answers_by_hand():
    samples = expert_training_samples([ExpertSample(7, (1, 2, 3, 4), 3), ExpertSample(8, (5, 6), 1)])
    assert [sample.tokens.tolist() for sample in samples] == [[1, 2, 3, 4], [5, 6]]
    assert [sample.loss_mask.tolist() for sample in samples] == [[False, False, False, True], [False, True]]
    for sample in samples:
        assert (sample.is_expert, sample.temperature, sample.advantage) == (True, 1.0, 0.0)
        assert sample.rollout_log_probs is None


def test_probes_score_every_token_but_the_first():
    samples = probe_samples([Prompt(0, "", (5, 6, 7), ""), Prompt(1, "", (8,), "")])
    assert [sample.tokens.tolist() for sample in samples] == [[5, 6, 7], [8]]
    assert [sample.loss_mask.tolist() for sample in samples] == [[False, True, True], [False]]
    assert [(sample.is_expert, sample.temperature) for sample in samples] == [(True, 1.0)] * 2
