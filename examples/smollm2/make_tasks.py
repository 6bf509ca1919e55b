"""Make small problems in words that SmolLM2-135M-Instruct half masters, with checkable answers.

The model answers in sentences. The experts answer as GSM8K's solutions do, with the computation in double angle
brackets and `#### 12` at the end.

| file | rows |
|---|---|
| `prompts.jsonl`, `experts.jsonl`, `validation.jsonl` | one addition of numbers up to 10 |
| `test.jsonl` | `held-out` additions, `harder` two of them, `not trained` capitals |

Prompts and experts, validation, and test have pairs of numbers of their own, in either order; a problem of two
additions begins with a pair of test. Everything depends on SEED alone.
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

PARTS_OF_PAIRS = slice(10), slice(10, 15), slice(15, 45)  # test, validation, trained
Pair = tuple[int, int]
Row = dict[str, str]


def one_step(rng: random.Random, pairs: list[Pair]) -> Row:
    """An addition of one of the pairs."""
    name, things, (a, b) = rng.choice(NAMES), rng.choice(THINGS), in_either_order(rng, pairs)
    question = f"{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?"
    return worked(question, [(f"{a}+{b}", a + b)], things)


def two_steps(rng: random.Random, pairs: list[Pair]) -> Row:
    """An addition of one of the pairs, and another one."""
    name, things, (a, b), c = rng.choice(NAMES), rng.choice(THINGS), in_either_order(rng, pairs), rng.randint(2, 10)
    question = f"{name} has {a} {things}, buys {b} more and finds {c} more. How many {things} does {name} have now?"
    return worked(question, [(f"{a}+{b}", a + b), (f"{a + b}+{c}", a + b + c)], things)


def in_either_order(rng: random.Random, pairs: list[Pair]) -> Pair:
    """One of the pairs."""
    a, b = rng.choice(pairs)
    return rng.choice([(a, b), (b, a)])


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
    pairs = [(a, b) for a in range(2, 11) for b in range(a, 11)]
    rng.shuffle(pairs)
    of_test, of_validation, trained = (pairs[place] for place in PARTS_OF_PAIRS)
    problems = different(partial(one_step, pairs=trained), rng, NUM_EXPERTS + NUM_PROMPTS)
    experts, prompts = problems[:NUM_EXPERTS], problems[NUM_EXPERTS:]
    validation = different(partial(one_step, pairs=of_validation), rng, NUM_VALIDATION)
    held_out = different(partial(one_step, pairs=of_test), rng, NUM_TEST)
    harder = different(partial(two_steps, pairs=of_test), rng, NUM_TEST)
    capitals = [
        {"prompt": f"What is the capital of {country}?", "answer": capital, "source": "not trained"}
        for country, capital in CAPITALS.items()
    ]
    return {
        "prompts": asked(prompts, "trained"),
        "experts": [{"prompt": row["prompt"], "answer": row["solution"]} for row in experts],
        "validation": asked(validation, "validation"),
        "test": [*asked(held_out, "held-out"), *asked(harder, "harder"), *capitals],
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
