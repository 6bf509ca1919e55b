"""A run over several sources: what it logs, and that it resumes to the same numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness import read_lines, read_metrics, succeeded, train_here, weight_bytes, write_config, write_rows

pytestmark = [pytest.mark.e2e]


def overrides(assets: Path, root: Path) -> tuple[str, ...]:
    few = write_rows(root / "few.jsonl", [{"prompt": f"{n} * 2 =", "answer": f"{2 * n}"} for n in range(5)])
    sources = f"[{assets / 'prompts.jsonl'}, {{path: {few}, weight: 3.0}}]"
    experts = f"[{assets / 'experts.jsonl'}, {few}]"
    return f"data.dataset={sources}", f"chord.chord_sft_dataset={experts}", "tracking.log_completions=100"


def test_a_resumed_run_over_several_sources_is_bitwise_the_undisturbed_one(assets: Path, tmp_path: Path):
    config, arguments = write_config(assets, tmp_path), overrides(assets, tmp_path)
    outcome = succeeded(train_here(config, *arguments))
    few = tmp_path / "few.jsonl"
    assert f"rows drawn: {assets / 'prompts.jsonl'} 25.0% of 24, {few} 75.0% of 5" in outcome.stdout
    assert f"rows drawn: {assets / 'experts.jsonl'} 76.2% of 16, {few} 23.8% of 5" in outcome.stdout
    run = tmp_path / "run"
    ids = [line["prompt_id"] for line in read_lines(run / "completions.jsonl")][::4]  # 4 completions of each
    # Two prompts a step, three of four from the second source, whose rows are numbered from 24 on.
    assert [int(row >= 24) for row in ids] == [1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1]
    metrics = read_metrics(run)
    assert "reward_by_source/prompts.jsonl" not in metrics[1] and "reward_by_source/few.jsonl" in metrics[1]
    both = (metrics[0][f"reward_by_source/{name}.jsonl"] for name in ("prompts", "few"))
    assert sum(both) / 2 == pytest.approx(metrics[0]["reward_mean"], abs=1e-12)

    shutil.copytree(run, tmp_path / "undisturbed")
    (run / "checkpoints" / "latest").write_text("step_2\n", encoding="utf-8")
    (run / "checkpoints" / "finished").unlink()
    succeeded(train_here(config, *arguments))
    assert read_metrics(run) == read_metrics(tmp_path / "undisturbed")
    for name in ("completions.jsonl", "experts.jsonl"):
        assert (run / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name
    assert weight_bytes(run, 6) == weight_bytes(tmp_path / "undisturbed", 6)

    (run / "checkpoints" / "finished").unlink()
    (run / "checkpoints" / "latest").write_text("step_4\n", encoding="utf-8")
    write_rows(few, [{"prompt": f"{n} * 2 =", "answer": f"{2 * n}"} for n in range(1, 6)])
    refused = train_here(config, *arguments)
    assert refused.code == 2
    assert f"data.dataset={assets / 'prompts.jsonl'}, {few} has other rows than when the run began" in refused.stderr


def test_a_finished_directory_of_other_data_is_refused(assets: Path, tmp_path: Path):
    config = write_config(assets, tmp_path)
    succeeded(train_here(config, "train.train_iters=1"))
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "1", "answer": "1"}] * 3)
    refused = train_here(config, "train.train_iters=1", f"data.dataset={other}")
    assert refused.code == 2
    assert f"holds a run with data.dataset={assets / 'prompts.jsonl'}, but this one has {other}" in refused.stderr
    same = succeeded(train_here(config, "train.train_iters=1", "optimizer.lr=5e-4"))
    assert same.stdout == (
        f"{tmp_path / 'run'} is finished (with other settings than now: optimizer.lr 0.001 -> 0.0005); raise "
        "train.train_iters to train on\n"
    )
