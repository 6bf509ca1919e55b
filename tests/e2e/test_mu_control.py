"""Closed loops of mu, and diagnosis, in whole runs: what they settle at, what they leave behind, resuming."""

from __future__ import annotations

import random
import runpy
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness import (
    read_lines,
    read_metrics,
    read_state,
    succeeded,
    train_here,
    train_on_forks,
    weight_bytes,
    write_rows,
)

pytestmark = pytest.mark.e2e

RATIO = ("chord.mu_schedule=gradient_ratio", "chord.mu_target=0.4", "chord.mu_update_steps=1")
WIDE = ("chord.chord_mu_peak=0.99", "chord.chord_mu_valley=0.01")
DIAGNOSIS = {"grad_norm_rollout", "grad_norm_expert", "gradient_cosine", "gradient_share"}
SAVED_LATE = ("train.save_steps=null",)


def without_diagnosis(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in DIAGNOSIS} for line in lines]


# --- diagnosis ------------------------------------------------------------------------------------------------------


def test_diagnosis_measures_every_n_steps_and_changes_nothing(config: Path, tmp_path: Path):
    plain, diagnosed = tmp_path / "plain", tmp_path / "diagnosed"
    steps = ("train.train_iters=4", "train.save_steps=4", "chord.chord_mu_valley=0.4")
    succeeded(train_here(config, *steps, f"train.output_dir={plain}"))
    succeeded(train_here(config, *steps, f"train.output_dir={diagnosed}", "tracking.diagnose_steps=3"))
    lines = read_metrics(diagnosed)
    assert [DIAGNOSIS & line.keys() for line in lines] == [DIAGNOSIS, set(), set(), DIAGNOSIS]
    assert not any(DIAGNOSIS & line.keys() for line in read_metrics(plain))
    assert without_diagnosis(lines) == read_metrics(plain)
    assert weight_bytes(diagnosed, 4) == weight_bytes(plain, 4)
    for line in (lines[0], lines[3]):
        of_rollouts, of_experts = 0.6 * line["grad_norm_rollout"], 0.4 * line["grad_norm_expert"]
        mixed = of_rollouts**2 + of_experts**2 + 2 * line["gradient_cosine"] * of_rollouts * of_experts
        assert line["grad_norm"] == pytest.approx(mixed**0.5, rel=1e-5)
        assert line["gradient_share"] == pytest.approx(of_experts / (of_rollouts + of_experts), rel=1e-12)


def test_what_is_told_of_experts_adds_up(config: Path, tmp_path: Path):
    succeeded(train_here(config, "train.train_iters=4", *SAVED_LATE))
    lines, rows = read_metrics(tmp_path / "run"), read_lines(tmp_path / "run" / "experts.jsonl")
    assert [row["step"] for row in rows] == [step for step in range(4) for _ in range(6)]
    first: dict[int, float] = {}
    for line in lines:
        assert sum(line[f"expert_p/0.{decile}"] for decile in range(10)) == pytest.approx(1)
        assert sum(line[f"expert_phi/0.{decile}"] for decile in range(10)) == pytest.approx(1)
        assert line["phi_mass"] == pytest.approx(line["phi_mean"] * line["num_expert_tokens"])
        assert line["expert_entropy"] > 0 and 0 <= line["idle_row_fraction"] <= 1
        of_step = [row for row in rows if row["step"] == line["step"]]
        assert sum(row["phi"] for row in of_step) == pytest.approx(line["phi_mass"])
        for row in of_step:
            assert row["shift"] == first.setdefault(row["id"], row["log_prob"]) - row["log_prob"]
    assert len(first) == 16 and any(row["shift"] for row in rows)  # 24 rows of 16


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_a_stream_that_rests_is_not_compared(mu: float, config: Path, tmp_path: Path):
    ends = (f"chord.chord_mu_peak={mu}", f"chord.chord_mu_valley={mu}")
    succeeded(train_here(config, "train.train_iters=2", *SAVED_LATE, *ends, "tracking.diagnose_steps=1"))
    for line in read_metrics(tmp_path / "run"):
        assert [line[name] for name in sorted(DIAGNOSIS)] == [None] * 4
        assert line["skipped_steps"] == 0 and line["grad_norm"] > 0
        experts = [line["expert_p/0.0"], line["expert_phi/0.9"], line["phi_mass"], line["expert_entropy"]]
        assert (experts == [None] * 4) == (mu == 0) and (line["idle_row_fraction"] is None) == (mu == 1)
    assert bool(read_lines(tmp_path / "run" / "experts.jsonl")) == (mu == 1)


# --- closed loops ---------------------------------------------------------------------------------------------------


def test_mu_follows_rewards(config: Path, tmp_path: Path):
    loop = ("chord.mu_schedule=reward", "chord.mu_target=0.7", "chord.mu_start=0.5", "chord.mu_smoothing=0.5")
    succeeded(train_here(config, *loop, "train.train_iters=4", *SAVED_LATE, "chord.chord_mu_valley=0.02"))
    average, expected = None, [0.5]
    for line in read_metrics(tmp_path / "run"):
        assert line["mu"] == pytest.approx(expected[-1], abs=1e-12)
        average = line["reward_mean"] if average is None else (average + line["reward_mean"]) / 2
        expected.append(min(max(0.7 - average, 0.02), 0.5))
    assert len({line["mu"] for line in read_metrics(tmp_path / "run")}) > 2


@pytest.mark.distributed
@pytest.mark.parametrize("schedule", ["reward", "gradient_ratio"])
def test_resumed_in_the_middle_a_loop_is_the_uninterrupted_one(schedule: str, config: Path, tmp_path: Path):
    """On two processes, bit for bit: mu of each step, and the weights."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    loop = (f"chord.mu_schedule={schedule}", "chord.mu_target=0.8", "chord.mu_start=0.8", *WIDE)
    loop += ("train.train_iters=6", "train.save_steps=3")
    if schedule == "gradient_ratio":
        loop += ("chord.mu_update_steps=2",)
    succeeded(train_on_forks(config, *loop, f"train.output_dir={whole}"))
    shutil.copytree(whole, stopped)
    (stopped / "checkpoints" / "latest").write_text("step_3\n", encoding="utf-8")
    (stopped / "checkpoints" / "finished").unlink()
    succeeded(train_on_forks(config, *loop, f"train.output_dir={stopped}"))

    lines = read_metrics(whole)
    assert read_metrics(stopped) == lines and len({line["mu"] for line in lines}) > 2
    assert weight_bytes(stopped, 6) == weight_bytes(whole, 6)
    assert (stopped / "experts.jsonl").read_bytes() == (whole / "experts.jsonl").read_bytes()
    assert read_state(stopped, 6) == read_state(whole, 6)
    history = read_state(whole, 3)["trainer"]["mu"]
    assert (history["log_gradient_ratio"] is None) == (schedule == "reward")


@pytest.mark.distributed
def test_two_layouts_steer_alike(config: Path, tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    loop = (*RATIO, *WIDE, "train.train_iters=3", *SAVED_LATE, "optimizer.lr=1e-4")
    succeeded(train_here(config, *loop, f"train.output_dir={one}"))
    succeeded(train_on_forks(config, *loop, f"train.output_dir={two}", "parallel.tensor_model_parallel_size=2"))
    for alone, both in zip(read_metrics(one), read_metrics(two), strict=True):
        assert both["mu"] == pytest.approx(alone["mu"], rel=1e-4)


@pytest.fixture(scope="module")
def quickstart(make_once: Callable[..., Path]) -> Path:
    """The quickstart's model and data."""
    return make_once("quickstart for mu", write_quickstart)


def write_quickstart(root: Path) -> None:
    make = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "quickstart" / "make_quickstart.py"))
    problems = make["sample_problems"](random.Random(0), 512)
    write_rows(root / "prompts.jsonl", list(make["prompt_rows"](problems[:256])))
    write_rows(root / "experts.jsonl", list(make["expert_rows"](problems[256:])))
    torch.manual_seed(0)
    tokenizer = make["build_tokenizer"]()
    make["build_model"](tokenizer).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    # Of random weights no completion is right; this differs between them.
    reward = "def digits(prompts, completions, references, **columns):\n"
    reward += "    return [sum(c.isdigit() for c in completion) / 30 for completion in completions]\n"
    (root / "rewards.py").write_text(reward, encoding="utf-8")


def shares_of_run(quickstart: Path, output: Path, steps: int, start: float) -> list[float]:
    """The expert stream's share of the gradient at each step of a run that begins at mu = `start`."""
    source = Path(__file__).parents[2] / "examples" / "quickstart" / "quickstart.yaml"
    settings = yaml.safe_load(source.read_text(encoding="utf-8"))
    settings["model"]["path"] = str(quickstart / "model")
    settings["parallel"]["tensor_model_parallel_size"] = 1
    settings["data"] = {"dataset": str(quickstart / "prompts.jsonl"), "max_prompt_length": 16}
    settings["rewards"]["reward_funcs"] = [f"{quickstart / 'rewards.py'}:digits"]
    settings["chord"] |= {"chord_sft_dataset": str(quickstart / "experts.jsonl"), "chord_mu_decay_steps": 0}
    settings["train"] |= {"output_dir": str(output), "train_iters": steps, "save_steps": None, "eval_steps": None}
    settings["tracking"] = {"report_to": []}
    output.mkdir()
    config = output.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    loop = (*RATIO, *WIDE, "chord.mu_smoothing=0.8", f"chord.mu_start={start}")
    steady = ("optimizer.lr=5e-4", "optimizer.lr_warmup_iters=0", "rollout.max_completion_length=12")
    succeeded(train_here(config, *loop, *steady))
    lines = read_metrics(output)
    assert lines[0]["mu"] == start
    return [line["gradient_share"] for line in lines]


def test_from_three_starts_the_share_settles_at_its_target(
    quickstart: Path, tmp_path: Path, measure: Callable[[str, float], None]
):
    for start in (0.05, 0.5, 0.95):
        shares = shares_of_run(quickstart, tmp_path / f"from {start}", 12, start)
        settled = statistics.fmean(shares[4:])
        measure(f"share of the gradient, of 0.4, from mu {start}", settled)
        assert settled == pytest.approx(0.4, rel=0.1)
        assert start == 0.5 or abs(shares[0] - 0.4) > 0.2  # it had some way to go
