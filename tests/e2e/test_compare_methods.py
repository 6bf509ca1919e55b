"""examples/reproduction/compare.py on a tiny experiment: what is finished is not done again, what is damaged is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from harness import write_config

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

COMPARE = Path(__file__).parents[2] / "examples" / "reproduction" / "compare.py"


def compare(folder: Path) -> list[str]:
    """Run it there; returns the lines that it printed."""
    paths = os.pathsep.join([str(COMPARE.parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(COMPARE), "tiny/experiment.yaml"]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_tiny_experiment_is_run_once(assets: Path, tmp_path: Path):
    rows = [json.loads(line) for line in (assets / "prompts.jsonl").read_text().splitlines()]
    test = [{**row, "source": source} for source in ("held-out", "harder", "not trained") for row in rows[:2]]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    recipe = write_config(assets, tmp_path)
    values = yaml.safe_load(recipe.read_text())
    values["data"] |= {"eval_dataset": str(assets / "prompts.jsonl"), "num_eval_prompts": 2}
    values["train"] |= {"eval_steps": 1, "save_steps": 1, "keep_best": True, "max_loss_tokens": 200}
    recipe.write_text(yaml.safe_dump(values))
    (tmp_path / "tiny").mkdir()
    experiment = {
        "title": "tiny",
        "setting": "tiny",
        "prepare": {},
        "recipe": str(recipe),
        "base": str(assets / "model"),
        "test": "test.jsonl",
        "grid": [1e-4, 1e-3],
        "tuning_seed": 0,
        "seeds": [1, 2],
        "expert_mark": "x",
        "side_by_side": 2,
        "methods": {
            "sft": {"title": "SFT", "keys": {"chord.chord_mu_peak": 1, "chord.chord_mu_valley": 1}},
            "two": {"title": "Two", "first": "sft", "keys": {"chord.chord_mu_peak": 0, "chord.chord_mu_valley": 0}},
        },
    }
    path = tmp_path / "tiny" / "experiment.yaml"
    path.write_text(yaml.safe_dump({**experiment, "test": "nowhere.jsonl"}))
    command = [sys.executable, str(COMPARE), "tiny/experiment.yaml"]
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1 and "nowhere.jsonl" in failed.stderr.splitlines()[-1]
    path.write_text(yaml.safe_dump(experiment))  # what came to nothing keeps nobody to it
    first = compare(tmp_path)
    # Two rates and two seeds of each method, and a first stage of each seed.
    assert sum(line.startswith("training ") for line in first) == 4 + 4 + 3
    evidence = tmp_path / "docs" / "evidence" / "tiny"
    written = (evidence / "results.json").read_bytes()
    results = json.loads(written)
    assert {name: [*method["runs"]] for name, method in results["methods"].items()} == {
        "sft": ["1", "2"],
        "two": ["1", "2"],
    }
    for method in results["methods"].values():
        for run in method["runs"].values():
            assert run["rollout_tokens"] + run["expert_tokens"] >= 200
    again = compare(tmp_path)
    assert not any(line.startswith("training ") for line in again)
    assert (evidence / "results.json").read_bytes() == written
    experiment["methods"]["sft"]["title"] = "Supervised"  # of the page, not of the runs
    path.write_text(yaml.safe_dump(experiment))
    assert not any(line.startswith("training ") for line in compare(tmp_path))
    assert json.loads((evidence / "results.json").read_bytes())["methods"]["sft"]["title"] == "Supervised"
    recipe.write_text(recipe.read_text().replace("max_loss_tokens: 200", "max_loss_tokens: 300"))
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (
        1,
        "error: the runs in runs/tiny are of another recipe; move them away, or restore it\n",
    )
