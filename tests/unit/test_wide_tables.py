"""Tables at a width: what does not fit follows in another one, and only what is longer than a line is folded."""

from __future__ import annotations

import pytest
from rich.console import Console

from chord_megatron.system.wide_tables import WideTable

COLUMNS, ROWS = ["run", "seed", "reward"], [["a", "0", "0.25"], ["b", "12", "0.5"]]


def cells(table: WideTable, width: int, capsys: pytest.CaptureFixture[str]) -> list[list[list[str]]]:
    """Of each line of each table, the heads included."""
    Console(width=width).print(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    tables: list[list[list[str]]] = []
    for line in lines:
        if line.startswith("┏"):
            tables.append([])
        elif line[0] in "┃│":
            tables[-1].append([cell.strip() for cell in line[1:-1].replace("┃", "│").split("│")])
    return tables


def test_a_table_that_fits_is_one(capsys: pytest.CaptureFixture[str]):
    width = 1 + 3 + 3 + 4 + 3 + 6 + 3
    assert cells(WideTable(COLUMNS, ROWS), width, capsys) == [[COLUMNS, *ROWS]]


def test_the_rest_is_another_with_the_first_column(capsys: pytest.CaptureFixture[str]):
    width = 1 + 3 + 3 + 4 + 3 + 6 + 3 - 1
    assert cells(WideTable(COLUMNS, ROWS), width, capsys) == [
        [["run", "seed"], ["a", "0"], ["b", "12"]],
        [["run", "reward"], ["a", "0.25"], ["b", "0.5"]],
    ]


def test_only_a_text_longer_than_a_line_is_folded(capsys: pytest.CaptureFixture[str]):
    long = "x" * 30
    assert cells(WideTable(["key", "a"], [[long, "[b]5"]]), 20, capsys) == [
        [["key", "a"], [*["x" * 9, "[b]5"]], ["x" * 9, ""], ["x" * 9, ""], ["x" * 3, ""]]
    ]
    assert cells(WideTable(["key"], [["1"]]), 20, capsys) == [[["key"], ["1"]]]
