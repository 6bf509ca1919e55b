"""examples/reproduction: tasks, statistics by hand, verdicts, and that the committed pages are what it writes."""

from __future__ import annotations

import json
import math
import random
import runpy
from itertools import combinations
from pathlib import Path

import make_tasks
import pytest
from claims import Claim, Comparison, best_fifth, fifths, findings, load_claims, verdict
from evidence import page, winner
from experiment import chosen_lr, load_experiment, make_trial
from results import curves
from seeds import Difference, next_one, paired_difference, spread

from chord_megatron.config import load_config
from chord_megatron.rewards.builtin import marked_accuracy
from chord_megatron.tracking.summary import History

ROOT = Path(__file__).parents[2]
EXPERIMENTS = [ROOT / "examples" / name / "experiment.yaml" for name in ("reproduction", "smollm2")]
T_OF_2 = 4.302652729749464  # the 97.5% quantile of Student's t with 2 degrees of freedom
ROWS = make_tasks.make_rows(random.Random(make_tasks.SEED))


def test_both_styles_of_a_sum():
    assert make_tasks.in_policy_style(347, 585) == "12 13 9 #### 932"
    assert make_tasks.in_expert_style(347, 585) == "hfa=bc eib=bd dfb=j #### 932"
    for style in (make_tasks.in_policy_style, make_tasks.in_expert_style):
        assert marked_accuracy("hash", [""], [style(950, 75 + 900)], [str(950 + 975)]) == [1.0]


def test_no_sum_is_in_two_sets():
    asked = {name: {row["prompt"] for row in rows} for name, rows in ROWS.items()}
    assert {name: len(rows) for name, rows in asked.items()} == {name: len(rows) for name, rows in ROWS.items()}
    assert all(not asked[one] & asked[other] for one, other in combinations(asked, 2))


def test_the_rows_are_the_same_each_time():
    again = make_tasks.make_rows(random.Random(make_tasks.SEED))
    assert again == ROWS
    assert [row["source"] for row in ROWS["test"]] == ["held-out"] * 512 + ["harder"] * 512 + ["not trained"] * 512


def test_spread_and_paired_difference_by_hand():
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0) and spread([5.0]) == (5.0, 0.0)
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert math.isclose(found.low, 2 - T_OF_2 / math.sqrt(3), rel_tol=1e-9) and found.sign == 0
    assert math.isclose(found.high, 2 + T_OF_2 / math.sqrt(3), rel_tol=1e-9)
    assert paired_difference([1.0], [0.0]) == (1.0, -math.inf, math.inf)
    low, high = next_one([1.0, 2.0, 3.0], 0.95)
    assert math.isclose(low, 2 - T_OF_2 * math.sqrt(4 / 3), rel_tol=1e-9) and math.isclose(low + high, 4)


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(0.1, 2)], "confirmed"),
        ([(0.1, 2), (-0.1, 2)], "not confirmed"),
        ([(0.1, 2), (-2, -0.1)], "contradicted"),
        ([(0.0, 2)], "not confirmed"),
    ],
)
def test_a_verdict_goes_by_the_intervals(intervals: list[tuple[float, float]], expected: str):
    assert verdict([Difference((low + high) / 2, low, high) for low, high in intervals]) == expected


def test_the_smallest_of_equally_good_learning_rates_is_chosen():
    assert chosen_lr({1e-3: 0.5, 1e-4: 0.75, 3e-4: 0.75}) == 1e-4


def test_fifths_of_a_curve():
    assert fifths([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]) == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert fifths([None, 1.0, 2.0, None, 4.0]) == [0.0, 1.0, 2.0, 0.0, 4.0]
    runs = [{"curves": {"eval_reward_mean": values}} for values in ([0, 1, 4, 3, 2], [0, 5, 4, 4, 2])]
    assert best_fifth(runs) == 2  # the means are 0, 3, 4, 3.5, 2


def step(number: int, **metrics: float) -> dict[str, float]:
    return {"step": number, "num_rollout_tokens": 10, "num_expert_tokens": 5, **metrics}


def test_curves_of_two_stages_are_one_curve():
    """Two steps of 15 tokens and two evaluations; then one step and two evaluations."""
    first = History(
        (step(0, reward_mean=0.0), step(1, reward_mean=0.5)),
        ({"step": 0, "eval_reward_mean": 0.1}, {"step": 2, "eval_reward_mean": 0.2}),
    )
    second = History(
        (step(0, reward_mean=1.0),), ({"step": 0, "eval_reward_mean": 0.2}, {"step": 1, "eval_reward_mean": 0.4})
    )
    found = curves([first, second])
    assert found["tokens"] == [0, 30, 30, 45] and found["step"] == [0, 2, 2, 3]
    assert found["eval_reward_mean"] == [0.1, 0.2, 0.2, 0.4]
    assert found["reward_mean"] == [None, 0.25, None, 1.0]
    assert found["entropy"] == [None] * 4


def result(rewards: dict[str, list[float]]) -> dict[str, object]:
    """Of methods whose runs have these rewards on all parts, from seeds 1, 2, 3; the base has 0.5."""
    parts = ("held-out", "harder", "not trained")
    return {
        "seeds": [1, 2, 3],
        "base": {"reward": dict.fromkeys(parts, 0.5)},
        "methods": {
            name: {
                "title": name.upper(),
                "runs": {str(seed + 1): {"reward": dict.fromkeys(parts, value)} for seed, value in enumerate(values)},
            }
            for name, values in rewards.items()
        },
    }


def test_a_claim_is_held_against_the_runs_and_left_out_where_a_method_is_missing():
    found = result({"chord_phi": [0.8, 0.7, 0.9], "grpo": [0.6, 0.5, 0.7]})
    claim = Claim(
        sentence="phi is above GRPO",
        comparisons=[Comparison(ours="chord_phi", theirs="grpo", measure="held-out")],
        why={"confirmed": "so", "not confirmed": "?", "contradicted": "no"},
    )
    other = claim.model_copy(update={"comparisons": [Comparison(ours="chord_phi", theirs="sft", measure="held-out")]})
    (said,) = findings(found, [claim, other])
    assert (said.verdict, said.why) == ("confirmed", "so")
    ((words, difference),) = said.differences
    assert words == "CHORD_PHI less GRPO, held-out, in points"
    assert [round(value, 9) for value in difference] == [20.0, 20.0, 20.0]


@pytest.mark.parametrize(
    ("phi", "said"),
    [([0.8, 0.9, 0.85], "CHORD wins"), ([0.6, 0.5, 0.55], "CHORD does not win"), ([0.5, 0.9, 0.7], "no difference is")],
)
def test_the_page_says_who_wins(phi: list[float], said: str):
    assert said in winner(result({"grpo": [0.7, 0.71, 0.69], "chord_phi": phi}), "held-out")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.parent.name)
def test_each_method_is_a_configuration(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(ROOT)
    experiment = load_experiment(path)
    grid = {name: dict.fromkeys(experiment.grid, 0.5) for name in experiment.methods}
    for name in experiment.methods:
        one = make_trial(tmp_path, experiment, name, experiment.grid[0], 7, grid)
        spent = 0
        for stage in one.stages:
            config = load_config(str(experiment.recipe), [f"{key}={value}" for key, value in stage.keys.items()])
            assert config.train.max_loss_tokens is not None
            spent += config.train.max_loss_tokens
        assert spent == experiment.budget


def test_the_problems_in_words_and_their_reward():
    smollm2 = ROOT / "examples" / "smollm2"
    rows = runpy.run_path(str(smollm2 / "make_tasks.py"))["make_rows"](random.Random(0))
    reward = runpy.run_path(str(smollm2 / "reward.py"))["right_answer"]
    questions = {name: {row["prompt"] for row in found} for name, found in rows.items()}
    assert all(not questions[one] & questions[other] for one, other in combinations(questions, 2))
    solutions = [row["answer"] for row in rows["experts"]]
    results = [solution.rsplit("#### ", 1)[1] for solution in solutions]
    assert reward(["?"] * 400, solutions, results) == [1.0] * 400
    said = ["He has 12 + 7 = 19.", "19 of them, not 20", "It is Paris, of course.", "Lyon"]
    assert reward(["?"] * 4, said, ["19", "19", "Paris", "Paris"]) == [1.0, 0.0, 1.0, 0.0]


def test_every_claim_has_a_sentence_for_every_verdict():
    for claim in load_claims().claims:
        assert set(claim.why) == {"confirmed", "not confirmed", "contradicted"}


@pytest.mark.parametrize(
    "results", sorted((ROOT / "docs" / "evidence").glob("*/results.json")), ids=lambda p: p.parent.name
)
def test_the_committed_page_is_what_its_numbers_say(results: Path):
    found = json.loads(results.read_text(encoding="utf-8"))
    assert results.with_name("README.md").read_text(encoding="utf-8") == page(found)
