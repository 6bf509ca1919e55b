"""Many tensor names in one sentence."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from math import prod


def list_names(names: Iterable[str]) -> str:
    """All names, and how many: those that differ in layer or expert numbers only as `layers.{0-27}.mlp`."""
    groups: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    count = 0
    for name in sorted(set(names)):
        numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
        pattern = name.replace("{", "{{").replace("}", "}}")  # a name of somebody else's
        groups[re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", pattern)].append(tuple(map(int, numbers)))
        count += 1
    return ", ".join(text for pattern, numbers in groups.items() for text in _fill(pattern, numbers)) + f" ({count})"


def _fill(pattern: str, numbers: list[tuple[int, ...]]) -> list[str]:
    columns = [sorted(set(column)) for column in zip(*numbers)]
    if len(numbers) == 1 or prod(map(len, columns)) != len(numbers):  # not every combination is there
        return [pattern.format(*row) for row in numbers]
    return [pattern.format(*map(_ranges, columns))]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> {0-2,5}; a single number stays as it is."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("-".join(map(str, run)) for run in runs)
    return text if text.isdigit() else "{" + text + "}"
