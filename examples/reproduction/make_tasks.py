"""Make what the comparison needs: a small Qwen3 with random weights, its tokenizer, and tasks with checkable answers.

Sums are solved in two styles that end alike, `#### 932` for `347+585`:

- the policy's: the sum of each column with its carry, from the right: `12 13 9 #### 932`;
- the experts': longer, and in another notation, with what is added, in letters, a for 0 to j for 9:
  `hfa=bc eib=bd dfb=j #### 932` (7 + 5 + 0 = 12, 4 + 8 + 1 = 13, 3 + 5 + 1 = 9).

| file | rows | what for |
|---|---|---|
| `policy.jsonl` | sums of 2 to 4 digits in the policy's style, and numbers to sort | to train the policy |
| `prompts.jsonl` | sums of 3 digits | rollouts |
| `experts.jsonl` | sums of 3 digits in the experts' style | expert answers, few |
| `validation.jsonl` | sums of 3 digits | learning rates and checkpoints are chosen by these |
| `test.jsonl` | `held-out` 3 digits, `harder` 4 digits, `not trained` sorting | the result, and nothing else |

No problem is in two of these sets as it is written there; a few are with their numbers the other way round. Everything
depends on SEED alone.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "quickstart"))

from make_quickstart import VOCABULARY as QUICKSTART
from make_quickstart import build_model, build_tokenizer, write_jsonl

SEED = 0
POLICY_SUMS, POLICY_SORTS = {2: 4000, 3: 6000, 4: 4000}, 4000  # by number of digits
NUM_DRAWN = {2: 4000, 3: 20_000, 4: 20_000}  # so that no size below changes another set
IN_EXPERT_STYLE = 2000  # of the policy's sums of 2 digits: it has read the other notation, seldom
NUM_PROMPTS, NUM_EXPERTS, NUM_VALIDATION, NUM_TEST = 4000, 256, 256, 512

VOCABULARY = [*QUICKSTART, "s", *"abcdefghij"]

Sum = tuple[int, int]
Row = dict[str, str]


def draw_sums(rng: random.Random, digits: int, count: int) -> list[Sum]:
    """`count` different pairs of numbers of so many digits."""
    low, span = 10 ** (digits - 1), 9 * 10 ** (digits - 1)
    return [(low + code // span, low + code % span) for code in rng.sample(range(span**2), count)]


def draw_numbers(rng: random.Random, count: int) -> list[str]:
    """`count` different numbers of 5 digits, none of them 0."""
    codes = rng.sample(range(9**5), count)
    return ["".join(str(1 + code // 9**place % 9) for place in range(5)) for code in codes]


def column_sums(a: int, b: int) -> list[tuple[str, str]]:
    """From the right: digit, digit and carry of each column, and their sum."""
    columns, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        columns.append((f"{x}{y}{carry}", str(total)))
        carry = total // 10
    return columns


def in_policy_style(a: int, b: int) -> str:
    """The sum of each column with its carry, then the sum."""
    return f"{' '.join(total for _, total in column_sums(a, b))} #### {a + b}"


def in_expert_style(a: int, b: int) -> str:
    """Digit, digit and carry = their sum for each column, in letters, then the sum."""
    worked = " ".join(f"{digits}={total}" for digits, total in column_sums(a, b))
    return f"{in_letters(worked)} #### {a + b}"


def in_letters(text: str) -> str:
    """Digits as letters, a for 0."""
    return text.translate(str.maketrans("0123456789", "abcdefghij"))


def solved(sums: Iterable[Sum], style: Callable[[int, int], str]) -> Iterator[Row]:
    """Rows whose answer is the text to imitate."""
    return ({"prompt": f"{a}+{b}", "answer": style(a, b)} for a, b in sums)


def asked(sums: Iterable[Sum], source: str) -> Iterator[Row]:
    """Rows whose answer is the number to compare with."""
    return ({"prompt": f"{a}+{b}", "answer": str(a + b), "source": source} for a, b in sums)


def sort_row(number: str, prefix: str = "") -> Row:
    """The digits of a number in order: the skill that is not trained."""
    return {"prompt": f"s{number}", "answer": f"{prefix}{''.join(sorted(number))}", "source": "not trained"}


def make_rows(rng: random.Random) -> dict[str, list[Row]]:
    """The rows of each file."""
    drawn = {digits: iter(draw_sums(rng, digits, NUM_DRAWN[digits])) for digits in POLICY_SUMS}
    numbers = draw_numbers(rng, POLICY_SORTS + NUM_TEST)
    learnt = [pair for digits, count in POLICY_SUMS.items() for pair in islice(drawn[digits], count)]
    held_out, validation, prompts = (list(islice(drawn[3], n)) for n in (NUM_TEST, NUM_VALIDATION, NUM_PROMPTS))
    experts, harder = islice(drawn[3], NUM_EXPERTS), islice(drawn[4], NUM_TEST)
    policy = [
        *solved(learnt[:IN_EXPERT_STYLE], in_expert_style),
        *solved(learnt[IN_EXPERT_STYLE:], in_policy_style),
        *(sort_row(number, "#### ") for number in numbers[:POLICY_SORTS]),
    ]
    test = [*asked(held_out, "held-out"), *asked(harder, "harder"), *map(sort_row, numbers[POLICY_SORTS:])]
    return {
        "policy": policy,
        "prompts": [*asked(prompts, "trained")],
        "experts": [*solved(experts, in_expert_style)],
        "validation": [*asked(validation, "validation")],
        "test": test,
    }


def write(directory: Path) -> None:
    """Write model/ and the five files into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in make_rows(random.Random(SEED)).items():
        write_jsonl(directory / f"{name}.jsonl", rows)
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer(VOCABULARY)
    build_model(tokenizer).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    write(parser.parse_args().directory)
