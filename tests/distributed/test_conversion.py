"""Hugging Face -> live Megatron model -> Hugging Face is bitwise the identity: every family under every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import launch
from selection import selected
from tiny_families import EP_2, MODELS, PP_2, TP_2, VPP_2, WITH_EXPERTS

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
# Models whose tensors are all of one dtype are converted alike in each; DeepSeek's in bfloat16 are not.
SHORT, EVERY_VARIANT_AT = " untied bfloat16", "TP 2 x PP 2"  # where tied heads are copied, and vocabularies padded
# Expert parallelism needs experts.
CASES = [
    pytest.param(
        layout,
        variant,
        marks=() if layout == EVERY_VARIANT_AT or variant.endswith(SHORT) else pytest.mark.slow,
    )
    for layout in LAYOUTS
    for variant in VARIANTS
    if "EP" not in layout or variant.startswith(WITH_EXPERTS)
]


@pytest.fixture(scope="module")
def findings(
    request: pytest.FixtureRequest, tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What went wrong, by selected layout and variant; layouts of as many processes share a launch."""
    wanted = selected(request, "layout", "variant")
    models = {}
    for variant in {variant for _, variant in wanted}:
        name, head, dtype = variant.split()
        models[variant] = (str(tiny_models(name, tied=head == "tied", dtype=dtype)), dtype)
    findings: dict[str, str] = {}
    for processes in (1, 2, 4):
        folder = tmp_path_factory.mktemp("findings")
        layouts = {
            layout: (settings, [variant for variant in VARIANTS if (layout, variant) in wanted])
            for layout, (count, settings) in LAYOUTS.items()
            if count == processes
        }
        (folder / "questions.json").write_text(json.dumps({"models": models, "layouts": layouts}), encoding="utf-8")
        launch(HERE / "conversion_worker.py", folder / "questions.json", folder / "findings.json", processes=processes)
        findings |= json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    return findings


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_weights_come_back_bitwise(layout: str, variant: str, findings: dict[str, str]) -> None:
    assert findings[f"{layout}: {variant}"] == ""
