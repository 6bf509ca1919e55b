"""A user's reward functions: arbitrary, but the same for the same completion everywhere."""

import re
import zlib


def hash_reward(prompts: list[str], completions: list[str], references: list[str], **columns: list) -> list[float]:
    """A number in [0, 1) for each completion, drawn from its text without special tokens."""
    texts = [re.sub(r"<\|\w+\|>", "", text) for text in completions]
    return [zlib.crc32(f"{prompt}{text}".encode()) % 1000 / 1000 for prompt, text in zip(prompts, texts)]


def never(prompts: list[str], completions: list[str], references: list[str]) -> list[None]:
    """No reward for any."""
    return [None for _ in completions]


def now_and_then(prompts: list[str], completions: list[str], references: list[str]) -> list[float | None]:
    """As `hash_reward`, but none for some completions."""
    rewards = hash_reward(prompts, completions, references)
    return [None if round(1000 * reward) % 5 < 2 else reward for reward in rewards]
