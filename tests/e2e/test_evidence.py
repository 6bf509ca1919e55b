"""One run of docs/evidence/reproduction again: its first steps as recorded, its result as its seeds let expect."""

from __future__ import annotations

import json
from pathlib import Path

import make_tasks
import pytest
from commands import run_chord_megatron
from experiment import load_experiment, make_trial
from harness import read_metrics
from results import curves
from seeds import next_one

from chord_megatron.tracking.summary import load_history

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence" / "reproduction"
METHOD, SEED = "chord_phi", 1
CONFIDENCE = 0.99  # that a right result is taken for one


def test_a_run_of_the_table_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the committed policy, on two ranks, where it was recorded on one: the layout changes nothing."""
    monkeypatch.chdir(ROOT)
    experiment = load_experiment(ROOT / "examples" / "reproduction" / "experiment.yaml")
    recorded = json.loads((EVIDENCE / "results.json").read_text(encoding="utf-8"))["methods"][METHOD]
    make_tasks.write(tmp_path)
    trial = make_trial(tmp_path / "runs", experiment, METHOD, recorded["lr"], SEED, {})
    here = (
        f"model.path={EVIDENCE / 'policy'}",
        f"data.dataset={tmp_path / 'prompts.jsonl'}",
        f"data.eval_dataset={tmp_path / 'validation.jsonl'}",
        f"chord.chord_sft_dataset={tmp_path / 'experts.jsonl'}",
    )
    run_chord_megatron("train", experiment.recipe, *trial.overrides, *here, "--nproc-per-node", "2")
    first = next(line for line in read_metrics(trial.directory) if "loss" in line)
    assert {key: first[key] for key in recorded["runs"][str(SEED)]["first_step"]} == pytest.approx(
        recorded["runs"][str(SEED)]["first_step"], rel=1e-4, abs=1e-5
    )
    windows = curves([load_history(trial.directory)])  # between evaluations
    for key in ("mu", "loss_expert", "phi_mean", "entropy"):
        assert windows[key][1] == pytest.approx(recorded["runs"][str(SEED)]["curves"][key][1], rel=0.02), key
    said = run_chord_megatron("evaluate", trial.directory, tmp_path / "test.jsonl", "--checkpoint", "best", "--json")
    found = {name: of["metrics"]["reward_mean"]["value"] for name, of in json.loads(said)["sources"].items()}
    for source, reward in found.items():
        low, high = next_one([run["reward"][source] for run in recorded["runs"].values()], CONFIDENCE)
        assert low <= reward <= high, (source, reward, low, high)
