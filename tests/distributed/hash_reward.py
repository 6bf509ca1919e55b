"""A user's reward function: arbitrary, but the same for the same completion everywhere."""

import re
import zlib


def hash_reward(prompts: list[str], completions: list[str], references: list[str], **columns: list) -> list[float]:
    """A number in [0, 1) for each completion, drawn from its text without special tokens."""
    texts = [re.sub(r"<\|\w+\|>", "", text) for text in completions]
    return [zlib.crc32(f"{prompt}{text}".encode()) % 1000 / 1000 for prompt, text in zip(prompts, texts)]
