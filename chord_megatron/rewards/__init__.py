"""Rewards of completions: built-in functions by name, and a user's own from `path.py:function`.

Every one has the same form: `function(prompts, completions, references, **columns) -> list[float]`. The user's own get
those of these arguments that their parameters name.
"""

from chord_megatron.rewards.functions import (
    RewardFunctions,
    Rewards,
    build_reward_function,
    check_reward_functions,
)

__all__ = ["RewardFunctions", "Rewards", "build_reward_function", "check_reward_functions"]
