"""Make small problems in words that SmolLM2-135M-Instruct half masters, with checkable answers.

The model answers in sentences. The experts answer as GSM8K's solutions do, with the computation in double angle
brackets and `#### 12` at the end.

| file | rows |
|---|---|
| `prompts.jsonl`, `experts.jsonl`, `validation.jsonl` | one addition of numbers up to 10 |
| `test.jsonl` | `held-out` additions, `harder` two of them, `not trained` capitals |

The numbers of validation and test are added in no prompt and by no expert. Everything depends on SEED alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

SEED = 0
NUM_PROMPTS, NUM_EXPERTS, NUM_VALIDATION, NUM_TEST = 2000, 400, 48, 96
NAMES = ("Ann", "Tom", "Mia", "Sam", "Eva", "Leo", "Zoe", "Ben", "Ida", "Max")
THINGS = ("apples", "books", "coins", "pens", "cards", "eggs", "shells", "stamps")
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Greece": "Athens", "Egypt": "Cairo", "Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow",
    "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest", "Ireland": "Dublin", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Belgium": "Brussels",
    "Turkey": "Ankara", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Canada": "Ottawa",
    "Mexico": "Mexico City", "Argentina": "Buenos Aires", "Kenya": "Nairobi", "Iran": "Tehran", "Iraq": "Baghdad",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "South Korea": "Seoul", "the Netherlands": "Amsterdam",
    "Switzerland": "Bern", "Czechia": "Prague", "Romania": "Bucharest", "Bulgaria": "Sofia", "Ukraine": "Kyiv",
    "the United Kingdom": "London", "the United States": "Washington", "Indonesia": "Jakarta", "Nepal": "Kathmandu",
    "Morocco": "Rabat", "Colombia": "Bogota", "Venezuela": "Caracas", "Lebanon": "Beirut", "Syria": "Damascus",
    "Jordan": "Amman",
}  # fmt: skip

PAIRS = [(a, b) for a in range(2, 11) for b in range(2, 11)]
Row = dict[str, str]


def one_step(rng: random.Random, *, is_held_out: bool) -> Row:
    """An addition, of numbers that are held out or of others."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.choice([pair for pair in PAIRS if ((pair[0] + 2 * pair[1]) % 5 == 0) == is_held_out])
    question = f"{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?"
    return worked(question, [(f"{a}+{b}", a + b)], things)


def two_steps(rng: random.Random) -> Row:
    """Two additions."""
    name, things, (a, b, c) = rng.choice(NAMES), rng.choice(THINGS), (rng.randint(2, 10) for _ in range(3))
    question = f"{name} has {a} {things}, buys {b} more and finds {c} more. How many {things} does {name} have now?"
    return worked(question, [(f"{a}+{b}", a + b), (f"{a + b}+{c}", a + b + c)], things)


def worked(question: str, steps: list[tuple[str, int]], things: str) -> Row:
    """A problem with its result and the experts' solution."""
    lines = [f"{computation}=<<{computation}={result}>>{result} {things}." for computation, result in steps]
    first, last = steps[0][0].split("+")[0], str(steps[-1][1])
    solution = "\n".join([f"We begin with {first} {things}.", *lines, f"#### {last}"])
    return {"prompt": question, "answer": last, "solution": solution}


def different(make: Callable[[random.Random], Row], rng: random.Random, count: int) -> list[Row]:
    """So many, no question twice."""
    found: dict[str, Row] = {}
    while len(found) < count:
        row = make(rng)
        found.setdefault(row["prompt"], row)
    return list(found.values())


def asked(rows: list[Row], source: str) -> list[Row]:
    """Without the solution."""
    return [{"prompt": row["prompt"], "answer": row["answer"], "source": source} for row in rows]


def make_rows(rng: random.Random) -> dict[str, list[Row]]:
    """The rows of each file."""
    problems = different(partial(one_step, is_held_out=False), rng, NUM_EXPERTS + NUM_PROMPTS)
    held_out = different(partial(one_step, is_held_out=True), rng, NUM_TEST + NUM_VALIDATION)
    experts, prompts = problems[:NUM_EXPERTS], problems[NUM_EXPERTS:]
    validation, held_out = held_out[:NUM_VALIDATION], held_out[NUM_VALIDATION:]
    capitals = [
        {"prompt": f"What is the capital of {country}?", "answer": capital, "source": "not trained"}
        for country, capital in CAPITALS.items()
    ]
    return {
        "prompts": asked(prompts, "trained"),
        "experts": [{"prompt": row["prompt"], "answer": row["solution"]} for row in experts],
        "validation": asked(validation, "validation"),
        "test": [*asked(held_out, "held-out"), *asked(different(two_steps, rng, NUM_TEST), "harder"), *capitals],
    }


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in make_rows(random.Random(SEED)).items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(directory)


if __name__ == "__main__":
    main()
