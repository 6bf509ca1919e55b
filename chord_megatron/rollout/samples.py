"""What an engine drew, as a RolloutSample."""

from __future__ import annotations

from collections.abc import Sequence

from chord_megatron.types import Prompt, RolloutSample, SamplingParams


def make_sample(
    prompt: Prompt,
    sample_index: int,
    response: Sequence[int],
    log_probs: Sequence[float],
    params: SamplingParams,
    policy_version: int,
) -> RolloutSample:
    """`response` includes a sampled end token; `log_probs` are its tokens'."""
    stopped = bool(response) and response[-1] in params.stop_token_ids
    return RolloutSample(
        prompt_id=prompt.id,
        sample_index=sample_index,
        tokens=(*prompt.tokens, *response),
        response_mask=(False,) * len(prompt.tokens) + (True,) * len(response),
        rollout_log_probs=(0.0,) * len(prompt.tokens) + tuple(log_probs),
        policy_version=policy_version,
        finish_reason="stop" if stopped else "length",
    )
