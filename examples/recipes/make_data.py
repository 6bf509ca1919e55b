"""Write the data files of these recipes from public data sets, by the rules of the paper's authors.

    python examples/recipes/make_data.py math data/math      # open-r1/OpenR1-Math-220k: 5,000 experts, 20,000 prompts
    python examples/recipes/make_data.py tools data/tools    # Team-ACE/ToolACE: 500 experts, 5,000 prompts

Each writes experts.jsonl, prompts.jsonl and heldout.jsonl, of different questions. The rules for math are those of
Trinity-RFT's examples/mix_chord/get_openr1_data.py, whose rows were drawn without a seed: these are others.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tool_call_reward import read_calls

Row = dict[str, Any]
_CHINESE = re.compile("[\u3400-\u9fff]")  # problems whose translation failed
_LONGEST_SOLUTION = 24_000  # characters: of about 8,000 tokens; the recipes drop what is longer in tokens


class Part(NamedTuple):
    """A file: so many rows of those that `make` takes."""

    name: str
    count: int
    make: Callable[[Row], Row | None]


def verified(row: Row) -> list[str]:
    """Solutions of OpenR1-Math that math-verify found right, and that are not too long."""
    if _CHINESE.search(row["problem"]):
        return []
    pairs = zip(row["generations"], row["correctness_math_verify"] or ())
    return [text for text, is_right in pairs if is_right and len(text) <= _LONGEST_SOLUTION]


def math_expert(row: Row) -> Row | None:
    """One of the solutions, always the same."""
    solutions = verified(row)
    if not solutions:
        return None
    return {"problem": row["problem"], "solution": random.Random(row["problem"]).choice(solutions)}


def math_prompt(row: Row) -> Row | None:
    """With an integer for its answer, and within reach: two solutions are right."""
    is_integer = re.fullmatch(r"\s*[+-]?\d+\s*", row["answer"] or "") is not None
    return (
        {"problem": row["problem"], "answer": row["answer"].strip()} if is_integer and len(verified(row)) > 1 else None
    )


def tool_row(row: Row) -> Row | None:
    """A conversation up to the first answer that calls tools: what an expert teaches, and a prompt's reference."""
    for number, turn in enumerate(row["conversations"]):
        if turn["from"] == "assistant" and read_calls(turn["value"]):
            return {"system": row["system"], "conversations": row["conversations"][: number + 1]}
    return None


SETTINGS = {
    "math": (
        "open-r1/OpenR1-Math-220k",
        (
            Part("experts", 5_000, math_expert),
            Part("prompts", 20_000, math_prompt),
            Part("heldout", 256, math_prompt),
        ),
    ),
    "tools": (
        "Team-ACE/ToolACE",
        (Part("experts", 500, tool_row), Part("prompts", 5_000, tool_row), Part("heldout", 250, tool_row)),
    ),
}


def question(made: Row) -> str:
    """What a row asks, but for case and white space."""
    text = made["problem"] if "problem" in made else json.dumps([made["system"], made["conversations"][:-1]])
    return " ".join(text.split()).casefold()


def distribute(rows: Iterable[Row], parts: Iterable[Part]) -> dict[str, list[Row]]:
    """Each row to the first part that takes it and is not full, a question once."""
    files: dict[str, list[Row]] = {part.name: [] for part in parts}
    asked: set[str] = set()
    for row in rows:
        for part in (part for part in parts if len(files[part.name]) < part.count):
            if (made := part.make(row)) is not None:
                if question(made) not in asked:
                    files[part.name].append(made)
                    asked.add(question(made))
                break
    short = [part for part in parts if len(files[part.name]) < part.count]
    if short:
        found = ", ".join(f"{len(files[part.name])} of {part.count} {part.name}" for part in short)
        raise SystemExit(f"the data set is too small: {found}; nothing was written")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()

    from datasets import load_dataset

    name, parts = SETTINGS[arguments.setting]
    files = distribute(load_dataset(name, split="train").shuffle(seed=42), parts)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for part, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (arguments.folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
