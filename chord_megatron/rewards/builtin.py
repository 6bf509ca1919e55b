r"""The reward functions that have a name: `accuracy` and `format`.

The final answer of a completion is its last `\boxed{...}`, `#### ...` line (GSM8K) or `<answer>...</answer>`;
in a completion without one, math-verify looks for it among the last 2000 characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import Any

RewardFunction = Callable[..., list[float]]

_MARKED_ANSWER = re.compile(
    # "#### Step 1" is a heading: the line counts where it is a number, or the last one.
    r"####[ \t]*(?P<number>[-+*$]*\d[\d,]*(?:\.\d+)?[.*]*)[ \t]*(?:\n|\Z)"
    r"|####[ \t]*(?P<line>[^\n]+)\s*\Z"
    r"|<answer>(?P<tag>(?:(?!</?answer>).)*+)</answer>"  # linear in time, like all of it
    # Braces nest twice, as in \frac{\sqrt{2}}{2}.
    r"|\\boxed\s*\{(?P<boxed>(?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+)\}",
    re.DOTALL,
)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_WORDS = re.compile(r"[^\W\d_]+(?:\s+[^\W\d_]+)*")  # math-verify would multiply their letters
_THINK_THEN_ANSWER = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)
_TOLERANCE = Decimal("1e-6")  # math-verify rounds to 6 decimals too
_TAIL = 2000  # characters that math-verify reads, from the end; its cost grows faster than the text
_SECONDS = 2  # of one math-verify call; it interrupts itself with SIGALRM, so only in the main thread


def accuracy(prompts: list[str], completions: list[str], references: list[str], /, **columns: Any) -> list[float]:
    """1.0 where the final answer equals the reference (as formulas, or literally for words), else 0.0."""
    return [float(_is_correct(*pair)) for pair in zip(completions, references, strict=True)]


def format_reward(prompts: list[str], completions: list[str], references: list[str], /, **columns: Any) -> list[float]:
    """1.0 where a completion is `<think>...</think><answer>...</answer>` and nothing else, else 0.0."""
    return [float(_THINK_THEN_ANSWER.fullmatch(completion) is not None) for completion in completions]


BUILTIN_REWARDS: dict[str, RewardFunction] = {"accuracy": accuracy, "format": format_reward}


def _is_correct(completion: str, reference: str) -> bool:
    answer = _marked_answer(completion)
    expected, number = _as_number(reference), _as_number(answer or "")
    if expected is not None and number is not None:
        return abs(expected - number) < _TOLERANCE
    gold = _parse_reference(reference)
    if not gold:
        return _normalise(reference) == _normalise(completion if answer is None else answer)
    from math_verify import verify

    found = _parse(completion) if answer is None else _parse_formula(answer)
    return bool(found) and verify(list(gold), found, timeout_seconds=_SECONDS)


def _marked_answer(completion: str) -> str | None:
    matches = list(_MARKED_ANSWER.finditer(completion))
    if not matches:
        return None
    answer: str = matches[-1][matches[-1].lastgroup or 0]
    return _marked_answer(answer) or answer  # <answer>\boxed{72}</answer>


def _as_number(text: str) -> Decimal | None:
    """The value of "72", "1,234.50", "$72" or "**72.**", else None."""
    text = text.strip(" \t\r\n*$").removesuffix(".")
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


@lru_cache(maxsize=4096)  # every completion of a group has the same reference
def _parse_reference(reference: str) -> tuple[Any, ...]:
    """What the reference may be as a formula; empty where it is words."""
    return () if _WORDS.fullmatch(_normalise(reference)) else tuple(_parse_formula(reference))


def _parse_formula(text: str) -> list[Any]:
    """A formula alone: as LaTeX, with or without its dollars, else as a plain expression such as "1/2"."""
    if _as_number(text) is None and "$" not in text:
        return _parse(f"${text}$") or _parse(text)
    return _parse(text)


def _parse(text: str) -> list[Any]:
    from math_verify import parse  # slow to import

    return parse(text[-_TAIL:], parsing_timeout=_SECONDS)


def _normalise(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", text)
    return " ".join(text.lower().split()).strip(" .:*$()")
