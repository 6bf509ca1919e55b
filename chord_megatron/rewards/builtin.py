"""The reward functions that have a name: `accuracy`, `format` and `soft_overlong`.

The final answer is what the last mark holds (answers.py), of a completion and of its reference alike; in a completion
without one, math-verify looks for it among the last 2000 characters (formulas.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from chord_megatron.rewards.answers import AnswerFormat, final_answer, without_thoughts
from chord_megatron.rewards.formulas import plain_words, read_formula, read_sentences, same_formula
from chord_megatron.rewards.numbers import read_number, same_number
from chord_megatron.system.errors import INTERRUPTIONS

RewardFunction = Callable[..., list[float]]


class FailedReward(float):
    """The 0 of a completion on which a built-in reward failed: no completion may end a run."""


def accuracy(
    prompts: list[str],
    completions: list[str],
    references: list[str],
    completion_ids: Sequence[Sequence[int]] = (),
    /,
    **columns: Any,
) -> list[float]:
    """1.0 where the final answer equals the reference's (as number, as formula, or literally for words), else 0.0."""
    return marked_accuracy("any", prompts, completions, references)


def marked_accuracy(
    answer_format: AnswerFormat,
    prompts: list[str],
    completions: list[str],
    references: list[str],
    completion_ids: Sequence[Sequence[int]] = (),
    /,
    **columns: Any,
) -> list[float]:
    """`accuracy` of completions that mark their answer so: 0.0 without such a mark. References may use any."""
    judge = partial(_is_correct, answer_format=answer_format)
    return _of_each("accuracy", judge, zip(completions, references, strict=True))


def format_reward(
    prompts: list[str],
    completions: list[str],
    references: list[str],
    completion_ids: Sequence[Sequence[int]] = (),
    /,
    **columns: Any,
) -> list[float]:
    """1.0 where a completion is `<think>...</think><answer>...</answer>` and nothing else, else 0.0."""
    return _of_each("format", _is_think_then_answer, ((completion,) for completion in completions))


def soft_overlong(
    max_length: int,
    cache_length: int,
    prompts: list[str],
    completions: list[str],
    references: list[str],
    completion_ids: Sequence[Sequence[int]],
    /,
    **columns: Any,
) -> list[float]:
    """0 up to max_length - cache_length tokens, then in a line to -1 at max_length (DAPO, arXiv 2503.14476, eq. 13).

    ms-swift's (swift/rewards/orm.py) goes on below -1; it differs where completions may be longer than max_length.
    """
    return [max(-1.0, min(0.0, (max_length - cache_length - len(ids)) / cache_length)) for ids in completion_ids]


# `soft_overlong` is bound to its two lengths first; of `accuracy` functions.py takes `marked_accuracy`.
BUILTIN_REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy,
    "format": format_reward,
    "soft_overlong": soft_overlong,
}


def _of_each(name: str, judge: Callable[..., bool], cases: Iterable[tuple[str, ...]]) -> list[float]:
    return [_of_one(name, judge, case) for case in cases]


def _of_one(name: str, judge: Callable[..., bool], case: tuple[str, ...]) -> float:
    try:
        return float(judge(*case))
    except INTERRUPTIONS:
        raise
    except BaseException as error:  # math-verify's own timeout is no Exception
        warnings.warn(
            f"the reward {name} failed on a completion, which gets 0: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=1,  # the same sentence is said once
        )
        return FailedReward()


def _is_correct(completion: str, reference: str, answer_format: AnswerFormat = "any") -> bool:
    completion, reference = without_thoughts(completion), without_thoughts(reference)
    marked, expected = final_answer(completion, answer_format), final_answer(reference)
    if marked is None and answer_format != "any":
        return False
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
