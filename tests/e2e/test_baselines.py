"""The baselines of examples/baselines, by configuration alone: each takes a step on the quickstart's task."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from harness import read_metrics, succeeded, train_here

from chord_megatron.config import load_config
from chord_megatron.training import run

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

EXAMPLES = Path(__file__).parents[2] / "examples"
BASELINES = sorted(path.stem for path in (EXAMPLES / "baselines").glob("*.yaml"))


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quickstart")
    with patch.object(sys, "argv", ["make_quickstart.py", "--output-dir", str(root)]):
        runpy.run_path(str(EXAMPLES / "quickstart" / "make_quickstart.py"), run_name="__main__")
    return root


def overrides(name: str, assets: Path, output_dir: Path) -> list[str]:
    """Two small steps, on the data where the test has put them."""
    config = load_config(EXAMPLES / "baselines" / f"{name}.yaml")
    sources = {"data.dataset": config.data.dataset, "chord.chord_sft_dataset": config.chord.chord_sft_dataset}
    return [
        *(f"{key}={assets / Path(source).name}" for key, source in sources.items() if source),
        f"model.path={assets / 'model'}",
        f"train.output_dir={output_dir}",
        "train.train_iters=2",
        "optimizer.lr_warmup_iters=1",
        "tracking.report_to=[]",
    ]


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_trains(name: str, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if name == "sft":
        monkeypatch.setattr(run, "build_rollout", lambda *_: pytest.fail("a rollout engine was built"))
    succeeded(train_here(EXAMPLES / "baselines" / f"{name}.yaml", *overrides(name, assets, tmp_path / "run")))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1]
    reads_prompts, reads_experts = name != "sft", "grpo" not in name
    for line in lines:
        assert (line["num_rollout_tokens"] > 0, line["num_expert_tokens"] > 0) == (reads_prompts, reads_experts)
        assert line["mu"] == {"sft": 1.0, "grpo": 0.0, "sft_then_grpo": 0.0}.get(name, line["mu"])


def test_prompts_are_asked_for_where_rollouts_are_drawn(assets: Path, tmp_path: Path):
    options = overrides("chord_mu", assets, tmp_path / "run")
    outcome = train_here(EXAMPLES / "baselines" / "chord_mu.yaml", *options, "data.dataset=null")
    assert outcome.code == 2
    assert "error: data.dataset is required while mu < 1; for supervised training alone set " in outcome.stderr
