"""The completions that a run has logged, as a page shows them: texts cut, and no more of them than a page holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chord_megatron.system.files import read_json_lines

LONGEST_TEXT = 20_000  # characters of a prompt or a completion, half from either end
LONGEST_FACT = 300
MOST_CHARACTERS = 20_000_000  # of all of them: what a browser opens at once
_ROW_CHARACTERS = 200  # about what a row's names and numbers take
_TEXTS = ("prompt", "completion")
_LARGEST = 1e300


@dataclass(frozen=True)
class Completion:
    """One row; `texts` are (name, text), `facts` every other column in a line."""

    step: int
    is_eval: bool
    reward: float | None
    facts: str
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Completions:
    """Those that fit on a page, as logged, and how many there are in all."""

    rows: tuple[Completion, ...]
    total: int

    def ends(self, most: int) -> list[tuple[str, list[Completion]]]:
        """The first and the last step and evaluation, each with its name and at most so many of its rows."""
        groups: dict[tuple[bool, int], list[Completion]] = {}
        for row in self.rows:
            groups.setdefault((row.is_eval, row.step), []).append(row)
        ends = []
        for is_eval, word in ((False, "Step"), (True, "Evaluation at step")):
            steps = sorted(step for kind, step in groups if kind == is_eval)
            ends += [(f"{word} {s}", groups[is_eval, s][:most]) for s in dict.fromkeys((*steps[:1], *steps[-1:]))]
        return ends


def read_completions(path: Path, most_characters: int = MOST_CHARACTERS) -> Completions:
    """Read completions.jsonl; where it is too long for a page, of steps spread evenly over the run.

    Raises UserError naming the line that is damaged.
    """
    sizes: dict[int, int] = {}
    total = 0
    for row in _rows(path):
        sizes[row.step] = sizes.get(row.step, 0) + _size(row)
        total += 1
    steps, room = _steps_that_fit(sizes, most_characters), most_characters
    rows = []
    for row in _rows(path):
        room -= _size(row) if row.step in steps else 0
        if row.step in steps and room >= 0:
            rows.append(row)
    return Completions(tuple(rows), total)


def _steps_that_fit(sizes: Mapping[int, int], most_characters: int) -> set[int]:
    """The last and the first step, and as many between them as there is room for, at even distances."""
    in_order = sorted(sizes)
    if not in_order:
        return set()
    # Places by their bits from the last to the first: each next one halves a gap.
    places = sorted(range(len(in_order)), key=lambda place: f"{place:064b}"[::-1])
    kept = {in_order[-1], in_order[0]}
    room = most_characters - sum(sizes[step] for step in kept)
    for step in (in_order[place] for place in places):
        if step not in kept and sizes[step] <= room:
            kept.add(step)
            room -= sizes[step]
    return kept


def _rows(path: Path) -> Iterator[Completion]:
    return (_completion(row) for row in read_json_lines(path))


def _completion(row: Mapping[str, Any]) -> Completion:
    reward: Any = row.get("reward")
    is_number = type(reward) in (int, float) and abs(reward) < _LARGEST  # not NaN either
    others = {key: value for key, value in row.items() if key not in ("step", "split", *_TEXTS)}
    return Completion(
        step=row["step"],
        is_eval=row.get("split") == "eval",
        reward=float(reward) if is_number else None,
        facts=" · ".join(_cut(f"{key}: {_short(value)}", LONGEST_FACT) for key, value in others.items()),
        texts=tuple((name, _cut(str(row[name]), LONGEST_TEXT)) for name in _TEXTS if name in row),
    )


def _size(row: Completion) -> int:
    return _ROW_CHARACTERS + len(row.facts) + sum(len(text) for _, text in row.texts)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [… {len(text) - 2 * half:,} characters …] {text[-half:]}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "null"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
