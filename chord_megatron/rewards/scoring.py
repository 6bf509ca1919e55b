"""Rewards of a generation batch, computed by all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from chord_megatron.rewards.functions import RewardFunctions, Rewards
from chord_megatron.system.errors import UserError
from chord_megatron.types import Prompt, RolloutSample, ScoredRollouts


def score_rollouts(
    prompts: Sequence[Prompt], rollouts: Sequence[RolloutSample], tokenizer: Any, reward_function: RewardFunctions
) -> ScoredRollouts:
    """Reward every completion; `prompts` are the batch's prompts, `rollouts` their groups in order.

    Each rank decodes and rewards whole groups, so that a function sees a prompt's completions together, and every rank
    gets all rewards. A failure on one rank is raised on all. Raises UserError.
    """
    num_generations = len(rollouts) // len(prompts)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    repeated = [prompt for prompt in prompts for _ in range(num_generations)]
    mine = [i for i in range(len(rollouts)) if (i // num_generations) % world_size == rank]
    completions = [completion_text(repeated[i], rollouts[i], tokenizer) for i in mine]
    tokens = [rollouts[i].response_tokens for i in mine]
    result = _reward([repeated[i] for i in mine], completions, tokens, num_generations, reward_function)
    results: list[tuple[list[int], Rewards | str]] = [(mine, result)] * world_size
    dist.all_gather_object(results, (mine, result))
    return _merge(repeated, rollouts, results)


def completion_text(prompt: Prompt, rollout: RolloutSample, tokenizer: Any) -> str:
    """What reward functions and logs see: the model's turn, with what of it the prompt held, without its end token.

    Special tokens stay: models write `<think>` and `<answer>` as such.
    """
    tokens = rollout.response_tokens
    if rollout.finish_reason == "stop":
        tokens = tokens[:-1]
    if not prompt.prefill:
        return str(tokenizer.decode(tokens, skip_special_tokens=False))
    # Behind a token: SentencePiece's decoders drop the space that a text begins with.
    before = [prompt.tokens[-1]]
    whole = str(tokenizer.decode([*before, *tokens], skip_special_tokens=False))
    return prompt.prefill + whole.removeprefix(str(tokenizer.decode(before, skip_special_tokens=False)))


def _reward(
    prompts: list[Prompt],
    completions: list[str],
    tokens: list[list[int]],
    num_generations: int,
    reward_function: RewardFunctions,
) -> Rewards | str:
    """The rewards, or what was wrong: the other ranks must hear of it."""
    if not prompts:  # more ranks than groups; a function of the user's need not expect empty lists
        return Rewards([], {})
    try:
        return reward_function(
            [prompt.text for prompt in prompts],
            completions,
            [prompt.reference for prompt in prompts],
            [prompt.columns for prompt in prompts],
            completion_ids=tokens,
            num_generations=num_generations,
        )
    except UserError as error:
        return str(error)


def _merge(
    prompts: list[Prompt],
    rollouts: Sequence[RolloutSample],
    results: list[tuple[list[int], Rewards | str]],
) -> ScoredRollouts:
    total = [0.0] * len(rollouts)
    errors = [0] * len(rollouts)
    by_function: dict[str, list[float]] = {}
    for indices, result in results:
        if isinstance(result, str):
            raise UserError(result)
        for place, index in enumerate(indices):
            total[index], errors[index] = result.total[place], result.errors[place]
            for name, rewards in result.by_function.items():
                by_function.setdefault(name, [0.0] * len(rollouts))[index] = rewards[place]
    return ScoredRollouts(
        prompts=tuple(prompts),
        rollouts=tuple(rollouts),
        rewards=tuple(total),
        rewards_by_function={name: tuple(rewards) for name, rewards in by_function.items()},
        reward_errors=tuple(errors),
    )
