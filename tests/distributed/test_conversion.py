"""Hugging Face -> live Megatron model -> Hugging Face is bitwise the identity: every family under every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch
from tiny_families import EP_2, MODELS, PP_2, TP_2, VPP_2, WITH_EXPERTS, write_model

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
LAYOUTS: dict[str, tuple[int, dict]] = {
    "TP 1": (1, {}),
    "TP 2": (2, TP_2),
    "PP 2": (2, PP_2),
    "PP 2 x VPP 2": (2, PP_2 | VPP_2),
    "EP 2": (2, EP_2),
    "TP 2 x EP 2": (2, TP_2 | EP_2),
    "TP 2 x PP 2": (4, TP_2 | PP_2),
    "PP 2 x EP 2": (4, PP_2 | EP_2),
    "PP 2 x VPP 2 x EP 2": (4, PP_2 | VPP_2 | EP_2),
    "TP 2 x PP 2 x EP 2": (4, TP_2 | PP_2 | EP_2),
}
VARIANTS = [
    f"{name} {head} {dtype}" for name in MODELS for head in ("tied", "untied") for dtype in ("float32", "bfloat16")
]


def legal_variants(layout: str) -> list[str]:
    """Expert parallelism needs experts."""
    return [variant for variant in VARIANTS if "EP" not in layout or variant.startswith(WITH_EXPERTS)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Variant -> its directory and dtype."""
    import torch

    root = tmp_path_factory.mktemp("models")
    for variant in VARIANTS:
        name, head, dtype = variant.split()
        write_model(root / variant, name, tied=head == "tied", dtype=getattr(torch, dtype))
    return {variant: (str(root / variant), variant.split()[2]) for variant in VARIANTS}


@pytest.fixture(scope="module")
def findings(models: dict[str, tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong, by layout and variant; layouts of as many processes share a launch."""
    findings: dict[str, str] = {}
    for processes in (1, 2, 4):
        folder = tmp_path_factory.mktemp("findings")
        layouts = {
            layout: (settings, legal_variants(layout))
            for layout, (count, settings) in LAYOUTS.items()
            if count == processes
        }
        (folder / "questions.json").write_text(json.dumps({"models": models, "layouts": layouts}), encoding="utf-8")
        launch(HERE / "conversion_worker.py", folder / "questions.json", folder / "findings.json", processes=processes)
        findings |= json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    return findings


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_back_bitwise(layout: str, findings: dict[str, str]) -> None:
    of_layout = {variant: findings[f"{layout}: {variant}"] for variant in legal_variants(layout)}
    assert len(of_layout) >= 4 * (3 if "EP" in layout else len(MODELS))
    assert not {variant: wrong for variant, wrong in of_layout.items() if wrong}
