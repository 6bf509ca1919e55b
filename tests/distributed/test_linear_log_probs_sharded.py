"""The fused vocabulary projection under TP 2 and TP 4 equals TP 1, with and without sequence parallelism.

In float64 values and gradients agree to 1e-12; in float32 and bfloat16 the results are bitwise equal on all ranks.
Its weight gradients reach the main gradients of Megatron-Core's DistributedDataParallel.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import launch

pytestmark = pytest.mark.distributed

CASES = [
    "V 320",
    "V 18992",
    "V 151936",
    "V 1001",
    "ignored rows",
    "all ignored",
    "rows without gradient",
    "no gradient",
    "saved logits",
    "one large tile",
    "no tokens",
]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong, by layout and case; one launch for all."""
    results = tmp_path_factory.mktemp("findings") / "findings.json"
    launch(Path(__file__).with_name("linear_log_probs_worker.py"), results, processes=4)
    return json.loads(results.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["TP 2", "TP 2 + SP", "TP 4", "TP 4 + SP"])
def test_shards_equal_the_whole(findings: dict[str, str], layout: str, case: str):
    assert findings[f"{layout}: {case}"] == ""


@pytest.mark.parametrize("case", ["untied", "tied", "untied with overlap", "tied with overlap"])
def test_main_gradients(findings: dict[str, str], case: str):
    assert findings[f"DDP: {case}"] == ""
