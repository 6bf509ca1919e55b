"""Several runs in one report: which are one curve, what their configurations differ in, numbers, and the command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from typer.testing import CliRunner

from chord_megatron.cli import app
from chord_megatron.system.errors import UserError
from chord_megatron.system.yaml_text import write_yaml
from chord_megatron.tracking.comparison import (
    Run,
    as_text,
    comparison_panels,
    curve_of,
    differences,
    group_runs,
    over_runs,
)
from chord_megatron.tracking.comparison_report import BAND, load_comparison, write_comparison
from chord_megatron.tracking.drawing import LIGHT, panel_figure, style
from chord_megatron.tracking.run_log import RunLog
from chord_megatron.tracking.summary import History, summarize_history


def settings(seed: int, lr: float = 1e-6, **keys: Any) -> dict[str, Any]:
    return {"train.seed": seed, "train.output_dir": f"runs/{seed}", "optimizer.lr": lr, **keys}


def run(name: str, known: dict[str, Any], rewards: list[float] | None = None) -> Run:
    rewards = rewards or [0.5]
    steps = tuple({"step": step, "loss": 1.0, "reward_mean": reward} for step, reward in enumerate(rewards))
    history = History(steps, ())
    return Run(name, known, history, summarize_history(history))


def write_run(run_dir: Path, seed: int, lr: float = 1e-6, reward: float = 0.5, **train: Any) -> Path:
    with RunLog(run_dir, train_iters=2, report_to=(), stream=io.StringIO()) as log:
        for step in range(2):
            log.log_step({"step": step, "loss": 0.5, "reward_mean": reward, "time_step": 1.0})
        log.log_eval(2, {"eval_reward_mean": reward})
    config = {"optimizer": {"lr": lr}, "train": {"seed": seed, "output_dir": str(run_dir), **train}}
    (run_dir / "config.yaml").write_text(write_yaml(config))
    return run_dir


def test_runs_that_differ_in_seed_and_place_alone_are_one_group():
    runs = [
        run("a", settings(0)),
        run("other", settings(0, lr=1e-5)),
        run("b", settings(1)),
        run("unknown", {}),
        run("unknown, too", {}),
        run("c", settings(2, **{"rollout.record_to": "c.jsonl"})),
    ]
    groups = group_runs(runs)
    assert [[each.name for each in group.runs] for group in groups] == [
        ["a", "b", "c"],
        ["other"],
        ["unknown"],
        ["unknown, too"],
    ]
    assert [group.name for group in groups] == ["a (3 runs)", "other", "unknown", "unknown, too"]
    assert [group.line for group in groups[:2]] == [("C0", "-"), ("C1", "-")]


def test_lines_have_other_dashes_where_colours_begin_anew():
    groups = group_runs([run(str(place), settings(0, lr=place / 8)) for place in range(14)])
    assert [group.line for group in groups[5:8]] == [("C5", "-"), ("C0", "--"), ("C1", "--")]
    assert groups[12].line == ("C0", ":")


def test_only_keys_that_differ_are_named_with_what_an_older_run_lacks():
    groups = group_runs(
        [
            run("a", settings(0, **{"rewards.reward_funcs": ["accuracy"], "chord.mu": None, "same": True})),
            run("b", settings(1, lr=0.5, **{"rewards.reward_funcs": ["accuracy", "format"], "same": True})),
            run("unknown", {}),
        ]
    )
    assert differences(groups) == [
        ("optimizer.lr", ["1e-06", "0.5", ""]),
        ("rewards.reward_funcs", ['["accuracy"]', '["accuracy", "format"]', ""]),
        ("chord.mu", ["null", "", ""]),
    ]
    assert differences(group_runs([run("a", settings(0)), run("unknown", {})])) == []


def test_a_value_without_an_end_is_cut():
    value: Any = ["x"]
    for _ in range(60):
        value = [value, value]  # what aliases of aliases in YAML make
    assert len(as_text(value)) < 200_000
    itself: list[Any] = []
    itself.append(itself)
    assert as_text(itself) == "[[[...]]]"


def test_mean_and_band_of_the_runs_that_reach_a_step():
    curves = [([0, 1, 2], [1.0, 2.0, 3.0]), ([0, 2], [3.0, 5.0])]
    assert over_runs(curves, lambda values: sum(values) / len(values)) == ([0, 1, 2], [2.0, 2.0, 4.0])
    assert over_runs(curves, min) == ([0, 1, 2], [1.0, 2.0, 3.0])
    assert over_runs(curves, max) == ([0, 1, 2], [3.0, 2.0, 5.0])


def test_a_curve_is_what_was_measured():
    steps = [
        {"step": step, "loss": 1.0, "loss_rollout": 0.0, "num_rollout_tokens": 10 * (step > 1)} for step in range(4)
    ]
    history = History(tuple(steps), ({"step": 4, "eval_reward_mean": 0.25}, {"step": 0, "eval_reward_mean": 0.5}))
    assert curve_of(history, "loss_rollout") == ([2, 3], [0.0, 0.0])  # without tokens it is logged as 0
    assert curve_of(history, "eval_reward_mean") == ([0, 4], [0.5, 0.25])
    assert curve_of(history, "kl") == ([], [])
    long = History(tuple({"step": step, "loss": float(step % 2)} for step in range(100)), ())
    assert curve_of(long, "loss")[1][50] == pytest.approx(2 / 5)  # two neighbours on either side: 0 1 0 1 0


def test_what_is_drawn_is_the_mean_and_the_band():
    groups = group_runs(
        [run("a", settings(0), [0.0, 1.0]), run("b", settings(1), [0.5, 0.5]), run("c", settings(0, 0.5))]
    )
    panels = comparison_panels(groups)
    assert [panel.title for panel in panels] == ["Reward of training rollouts", "Loss"]
    with mpl.rc_context(style(LIGHT)):
        axis = panel_figure(panels[0]).axes[0]
        mean, other = axis.get_lines()
        assert (mean.get_xydata().tolist(), other.get_xydata().tolist()) == ([[0, 0.25], [1, 0.75]], [[0, 0.5]])
        (band,) = axis.collections
        assert {tuple(point) for point in band.get_paths()[0].vertices.tolist()} >= {(0, 0), (0, 0.5), (1, 0.5), (1, 1)}


def test_the_page_and_the_table(tmp_path: Path):
    runs = [
        write_run(tmp_path / "a", 0, reward=0.25),
        write_run(tmp_path / "b", 1, reward=0.75),
        write_run(tmp_path / "<b>", 0, lr=1e-5, run_name="</script><b>"),
    ]
    comparison = load_comparison(runs)
    columns, rows = comparison.numbers()
    numbers = ["steps", "first eval", "last eval", "best eval", "last reward", "last loss", "seconds in steps"]
    assert columns == ["run", "seed", *numbers]
    assert rows == [
        (["a", "0", "2", *["0.2500 (step 2)"] * 3, "0.2500", "0.5000", "2.0"], False),
        (["b", "1", "2", *["0.7500 (step 2)"] * 3, "0.7500", "0.5000", "2.0"], False),
        (["mean of 2", "", "2", *["0.5000"] * 3, "0.5000", "0.5000", "2.0"], True),
        (["<b>", "0", "2", *["0.5000 (step 2)"] * 3, "0.5000", "0.5000", "2.0"], False),
    ]
    png, html = write_comparison(comparison, tmp_path / "new" / "folder")
    assert png.read_bytes().startswith(b"\x89PNG")
    page = html.read_text("utf-8")
    assert f'<p class="note">{BAND}</p>' in page and "default-src 'none'" in page
    assert "&lt;b&gt;" in page and "<b>" not in page and "<script" not in page
    assert page.count("<picture>") == 4  # rewards, losses, seconds
    assert (
        '<tr><th>train.run_name</th><td class="text"></td><td class="text">&lt;/script&gt;&lt;b&gt;</td></tr>' in page
    )


def test_names_tell_runs_apart(tmp_path: Path):
    runs = [write_run(tmp_path / place / "run", seed) for seed, place in enumerate(("x", "y"))]
    assert [each.name for each in load_comparison(runs).groups[0].runs] == ["x/run", "y/run"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a"], "name two runs or more"),
        (["a", "a/../a"], r"a is named twice; name each run once"),
        (["a", "missing"], r"metrics.jsonl does not exist; give the output directory of a training run"),
        (["a", "broken"], r"broken/config.yaml is not the configuration of a run"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path: Path, names: list[str], said: str):
    write_run(tmp_path / "a", 0)
    (write_run(tmp_path / "broken", 0) / "config.yaml").write_text("[")
    with pytest.raises(UserError, match=said):
        load_comparison([tmp_path / name for name in names])


def test_at_80_columns_no_number_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a table that is wider the rest follows in another, with the runs' names again."""
    monkeypatch.setenv("COLUMNS", "80")
    runs = [str(write_run(tmp_path / f"chord-mu-{seed}", seed, reward=0.25, lr=seed / 8)) for seed in range(3)]
    result = CliRunner().invoke(app, ["compare", *runs, "--output", str(tmp_path / "out")])
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines if "│" in line) <= 80
    assert [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│ chord-mu-1 " in line] == [
        ["chord-mu-1", "1", "2", "0.2500 (step 2)", "0.2500 (step 2)"],
        ["chord-mu-1", "0.2500 (step 2)", "0.2500", "0.5000", "2.0"],
    ]


def test_the_command(tmp_path: Path):
    runs = [str(write_run(tmp_path / "[bold]a", 0)), str(write_run(tmp_path / "b", 0, lr=1e-5))]
    output = tmp_path / "out"
    result = CliRunner().invoke(app, ["compare", *runs, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "[bold]a" in result.stdout and "optimizer.lr" in result.stdout
    assert sorted(path.name for path in output.iterdir()) == ["comparison.html", "comparison.png"]
    result = CliRunner().invoke(app, ["compare", *runs, "--output", str(output), "--json"])
    said = json.loads(result.stdout)
    assert said["differences"] == {"optimizer.lr": {"[bold]a": "1e-06", "b": "1e-05"}}
    assert [(each["name"], each["runs"][0]["seed"], each["runs"][0]["last_reward"]) for each in said["groups"]] == [
        ("[bold]a", 0, 0.5),
        ("b", 0, 0.5),
    ]
    assert CliRunner().invoke(app, ["compare", runs[0]]).exit_code == 2
