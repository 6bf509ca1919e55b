"""docs/scaling.md holds what the planner computes today."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from make_scaling import DOCUMENT, table


@pytest.mark.parametrize(("model", "gpus"), [("Qwen2.5-7B", 8), ("Qwen2.5-32B", 32)])
def test_a_row_of_the_document(model: str, gpus: int):
    text = DOCUMENT.read_text(encoding="utf-8")
    assert "**No number on this page was measured.**" in text
    (line,) = table(model, "h100", [gpus])[4:-1]
    section = text.partition(f"### {model}\n")[2].partition("###")[0].splitlines()
    # All but the scaling, which is of the first row.
    rows = [row.split(" | ") for row in section if row.startswith(f"| {gpus} |")]
    assert [[*row[:8], *row[9:]] for row in rows] == [[*line.split(" | ")[:8], *line.split(" | ")[9:]]]
