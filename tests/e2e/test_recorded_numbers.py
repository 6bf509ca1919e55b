"""Five steps compute what they did when recorded_numbers.json was made: bit for bit where the machine is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from record_numbers import CASES, LAYOUTS, RECORDING, environment, record

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

SHORT = ("TP 2", "off-policy")
PAIRS = [
    pytest.param(layout, case, marks=() if (layout, case) == SHORT else pytest.mark.slow)
    for layout in LAYOUTS
    for case in CASES
]


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    return json.loads(RECORDING.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("layout", "case"), PAIRS)
def test_five_steps_compute_the_recorded_numbers(
    layout: str, case: str, recording: dict[str, Any], tmp_path: Path, measure: Callable[[str, str], None]
) -> None:
    wanted, actual = recording["runs"][f"{layout}, {case}"], record(tmp_path, layout, case)
    # A metric that is younger than the recording changes nothing of it.
    lines = zip(actual["metrics"], wanted["metrics"], strict=True)
    actual["metrics"] = [{key: line[key] for key in recorded} for line, recorded in lines]
    if environment() == recording["environment"]:
        measure("recorded numbers", "compared bit for bit, on the machine of the recording")
        assert actual == wanted
        return
    measure("recorded numbers", f"tokens equal and losses within 1e-6, as {environment()} differs from the recording's")
    assert actual["tokens"] == wanted["tokens"]
    assert losses(actual) == pytest.approx(losses(wanted), rel=1e-6)


def losses(run: dict[str, Any]) -> list[float]:
    return [float.fromhex(line["loss"]) for line in run["metrics"]]
