"""The reward functions that have a name: `accuracy` and `format`.

The final answer is what the last mark holds (answers.py), of a completion and of its reference alike; in a completion
without one, math-verify looks for it among the last 2000 characters (formulas.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chord_megatron.rewards.answers import final_answer, without_thoughts
from chord_megatron.rewards.formulas import plain_words, read_formula, read_sentences, same_formula
from chord_megatron.rewards.numbers import read_number, same_number

RewardFunction = Callable[..., list[float]]


def accuracy(prompts: list[str], completions: list[str], references: list[str], /, **columns: Any) -> list[float]:
    """1.0 where the final answer equals the reference's (as number, as formula, or literally for words), else 0.0."""
    return [float(_is_correct(*pair)) for pair in zip(completions, references, strict=True)]


def format_reward(prompts: list[str], completions: list[str], references: list[str], /, **columns: Any) -> list[float]:
    """1.0 where a completion is `<think>...</think><answer>...</answer>` and nothing else, else 0.0."""
    return [float(_is_think_then_answer(completion)) for completion in completions]


BUILTIN_REWARDS: dict[str, RewardFunction] = {"accuracy": accuracy, "format": format_reward}


def _is_correct(completion: str, reference: str) -> bool:
    completion, reference = without_thoughts(completion), without_thoughts(reference)
    marked, expected = final_answer(completion), final_answer(reference)
    answer = completion.strip() if marked is None else marked
    expected = reference.strip() if expected is None else expected
    if not answer or not expected:
        return False
    if answer == expected:
        return True
    number, expected_number = read_number(answer), read_number(expected)
    if number is not None and expected_number is not None:
        return same_number(number, expected_number)
    gold = read_formula(expected)
    if not gold:
        return plain_words(answer) == plain_words(expected)
    return same_formula(gold, read_sentences(answer) if marked is None else read_formula(answer))


def _is_think_then_answer(completion: str) -> bool:
    thought, tag, answer = completion.strip().rpartition("<answer>")
    return (
        bool(tag)
        and thought.startswith("<think>")
        and thought.rstrip().endswith("</think>")
        and answer.endswith("</answer>")
        and answer.count("</answer>") == 1
    )
