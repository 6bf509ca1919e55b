"""Several reward functions as one weighted sum."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from chord_megatron.rewards.answers import AnswerFormat
from chord_megatron.rewards.arguments import Offer
from chord_megatron.rewards.builtin import BUILTIN_REWARDS, FailedReward, RewardFunction, marked_accuracy
from chord_megatron.rewards.plugin import Limits, PluginReward, is_plugin
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import did_you_mean, shown

OnError = Literal["stop", "leave_out"]

_LARGEST_REWARD = 1e30  # as of the numbers of a configuration: a weighted sum and its square stay finite


@dataclass(frozen=True)
class Rewards:
    """Rewards of some completions, in their order; NaN: the function gave none, the completion is unscorable."""

    total: list[float]  # sum over functions of weight * reward
    by_function: dict[str, list[float]]  # as named in rewards.reward_funcs, without the weights
    errors: list[int] = field(default_factory=list)  # built-in functions that failed on the completion


class RewardFunctions:
    """The configured reward functions; `close` ends the processes of the user's own."""

    def __init__(
        self,
        functions: dict[str, RewardFunction],
        weights: list[float],
        columns: Collection[str],
        on_error: OnError,
        resources: ExitStack,
    ):
        self._functions, self._weights, self._columns, self._resources = functions, weights, columns, resources
        self._may_be_nan = on_error == "leave_out"

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        references: list[str],
        columns: Sequence[Mapping[str, Any]],
        *,
        completion_ids: Sequence[Sequence[int]] = (),
        num_generations: int = 1,
    ) -> Rewards:
        """Reward each completion; `columns` are those of its row, `completion_ids` its tokens. Raises UserError."""
        assert len(prompts) == len(completions) == len(references) == len(columns)
        names = dict.fromkeys([*self._columns, *(name for row in columns for name in row)])
        by_name = {name: [row.get(name) for row in columns] for name in names}
        by_function = {}
        for name, function in self._functions.items():
            rewards = function(prompts, completions, references, completion_ids, **by_name)
            by_function[name] = _checked(name, rewards, len(completions), self._may_be_nan)
        totals = _weighted_sums([*by_function.values()], self._weights, num_generations)
        errors = [sum(isinstance(reward, FailedReward) for reward in rewards) for rewards in zip(*by_function.values())]
        return Rewards(totals, by_function, errors)

    def close(self) -> None:
        """End the child processes; safe to call twice."""
        self._resources.close()


def check_reward_functions(reward_funcs: list[str], reward_weights: list[float] | None) -> None:
    """What the configuration says of them, as far as nothing has to be loaded. Raises UserError."""
    if reward_weights is not None and len(reward_weights) != len(reward_funcs):
        raise UserError(
            f"rewards.reward_weights has {len(reward_weights)} values for {len(reward_funcs)} rewards.reward_funcs; "
            "give one for each, or null"
        )
    for name in reward_funcs:
        if reward_funcs.count(name) > 1:
            raise UserError(f"rewards.reward_funcs names {name} twice; name it once, with the weight of both")
        if name not in BUILTIN_REWARDS and not is_plugin(name):
            raise UserError(
                f"rewards.reward_funcs: unknown reward function {name!r}; use {', '.join(BUILTIN_REWARDS)} or "
                f"path.py:function{did_you_mean(name, [*BUILTIN_REWARDS])}"
            )


def build_reward_function(
    reward_funcs: list[str],
    reward_weights: list[float] | None,
    timeout_seconds: float,
    *,
    memory_limit_gb: float | None = None,
    environment: Sequence[str] = (),
    columns: Collection[str] | None = None,
    reference_column: str | None = None,
    soft_max_length: int | None = None,
    soft_cache_length: int | None = None,
    answer_format: AnswerFormat = "any",
    on_error: OnError = "stop",
) -> RewardFunctions:
    """Reward functions from names or `path.py:function`, loaded now; weights are 1 by default.

    Time, memory and environment are those of plugin.py's `Limits`. `columns` are those of the data: a function that
    needs another is refused, where they are given. The two lengths are those of `soft_overlong`, the format is that of
    `accuracy`. Raises UserError.
    """
    check_reward_functions(reward_funcs, reward_weights)
    weights = reward_weights if reward_weights is not None else [1.0] * len(reward_funcs)
    limits = Limits(timeout_seconds, memory_limit_gb, tuple(environment))
    offer = Offer(columns, reference_column)
    bound: dict[str, RewardFunction] = {
        **BUILTIN_REWARDS,
        "accuracy": partial(marked_accuracy, answer_format),
        "soft_overlong": partial(BUILTIN_REWARDS["soft_overlong"], soft_max_length, soft_cache_length),
    }
    with ExitStack() as resources:  # ends the processes already started where a later function fails
        functions: dict[str, RewardFunction] = {}
        for name in reward_funcs:
            if name in bound:
                functions[name] = bound[name]
            else:
                plugin = functions[name] = PluginReward(name, limits, offer)
                resources.callback(plugin.close)
        return RewardFunctions(functions, weights, columns or (), on_error, resources.pop_all())


def _weighted_sums(by_function: list[list[float]], weights: list[float], num_generations: int) -> list[float]:
    """The reward of each completion; NaN where it has none.

    A function that scores nothing of a group does not apply to it, as one of several tasks' does not to the others
    (TRL's None). What it scores of a group's other completions, a completion must have: the sum of the rest would
    compare with theirs by what is missing.
    """
    totals = []
    for start in range(0, len(by_function[0]), num_generations):
        groups = [rewards[start : start + num_generations] for rewards in by_function]
        applying = [(w, group) for w, group in zip(weights, groups) if not all(map(math.isnan, group))]
        for place in range(len(groups[0])):
            totals.append(sum(weight * group[place] for weight, group in applying) if applying else math.nan)
    return totals


def _checked(name: str, rewards: Any, count: int, may_be_nan: bool) -> list[float]:
    """`rewards`, as far as they are `count` finite numbers, or NaN for NaN and None. Raises UserError."""
    if not isinstance(rewards, list):
        raise UserError(f"reward function {name} must return a list of numbers, not {shown(rewards)}")
    if len(rewards) != count:
        raise UserError(f"reward function {name} returned {len(rewards)} rewards for {count} completions")
    if may_be_nan:
        rewards = [math.nan if reward is None else reward for reward in rewards]
    for index, reward in enumerate(rewards):
        if may_be_nan and _is_missing(reward):
            continue
        if not isinstance(reward, (int, float)) or (isinstance(reward, float) and not math.isfinite(reward)):
            remedy = "; rewards.on_error=leave_out leaves such completions out" if _is_missing(reward) else ""
            raise UserError(
                f"reward function {name} returned {shown(reward)}, not a finite number, at index {index}{remedy}"
            )
        if abs(reward) > _LARGEST_REWARD:
            raise UserError(
                f"reward function {name} returned {shown(reward)}, beyond {_LARGEST_REWARD:g}, at index {index}"
            )
    return [reward if isinstance(reward, FailedReward) else float(reward) for reward in rewards]


def _is_missing(reward: Any) -> bool:
    return reward is None or (isinstance(reward, float) and math.isnan(reward))
