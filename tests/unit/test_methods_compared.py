"""examples/reproduction: tasks, statistics by hand, verdicts, and that the committed pages are what it writes."""

from __future__ import annotations

import json
import math
import random
import re
import runpy
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import make_tasks
import pytest
import yaml
from claims import MEASURES, Claim, Comparison, fifths, findings, load_claims, missing_methods, verdict
from evidence import at_an_edge, page, shown_difference, shown_versions, winner
from experiment import Method, chosen_lr, load_experiment, make_trial
from results import OF_STEPS, curves
from seeds import Difference, next_one, paired_difference, spread

from chord_megatron.config import load_config
from chord_megatron.rewards.builtin import marked_accuracy
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.summary import History

ROOT = Path(__file__).parents[2]
EXPERIMENTS = [ROOT / "examples" / name / "experiment.yaml" for name in ("reproduction", "smollm2")]
T_OF_2 = 4.302652729749464  # the 97.5% quantile of Student's t with 2 degrees of freedom
SMALL_PAIRS = {"prompts": 30, "experts": 30, "validation": 5, "held-out": 10, "harder": 10}  # of smollm2's 45
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


def result(rewards: dict[str, list[float]], curve: Sequence[float] = (0.5,) * 6) -> dict[str, Any]:
    """Of methods whose runs have these rewards on all parts, from seeds 1, 2, ...; the base has 0.5.

    curve: the validation of each run, and of the one that tuned it.
    """
    parts = ("held-out", "harder", "not trained")

    def tested(value: float) -> dict[str, Any]:
        return {key: dict.fromkeys(parts, value) for key in ("reward", "length", "in_expert_style")}

    def run(value: float) -> dict[str, Any]:
        keys = ("tokens", "step", "eval_reward_mean", "eval_response_length_mean", *OF_STEPS)
        spent = dict.fromkeys(("steps", "rollout_tokens", "expert_tokens", "validation"), value)
        return {**tested(value), **spent, "evaluations": [5], "curves": {key: list(curve) for key in keys}}

    def method(name: str, values: list[float]) -> dict[str, Any]:
        runs = {str(seed): run(value) for seed, value in enumerate(values, 1)}
        record = {"title": name.upper(), "is_chord": "chord" in name, "lr": 1e-3, "first": None, "first_lr": None}
        record |= {"grid": {"0.001": 0.5, "0.1": 0.25}}
        return {**record, "tuning_validation": list(curve), "runs": runs}

    return {
        "title": "T",
        "setting": "S",
        "machine": "M",
        "made_with": ["torch 2"],
        "budget": 1000,
        "grid": ["0.001", "0.1"],
        "tuning_seed": 0,
        "tested_checkpoint": "best",
        "seeds": [*range(1, 1 + len(next(iter(rewards.values()))))],
        "base": tested(0.5),
        "methods": {name: method(name, values) for name, values in rewards.items()},
    }


def test_a_claim_is_held_against_the_runs_and_left_out_where_a_method_is_missing():
    found = result({"chord_phi": [0.8, 0.71, 0.9], "grpo": [0.6, 0.5, 0.7]})
    claim = Claim(
        sentence="phi is above GRPO",
        comparisons=[Comparison(ours="chord_phi", theirs="grpo", measure="held-out")],
        why={"confirmed": "so", "not_confirmed": "?", "contradicted": "no"},
    )
    other = claim.model_copy(update={"comparisons": [Comparison(ours="chord_phi", theirs="sft", measure="held-out")]})
    (said,) = findings(found, [claim, other])
    assert (said.verdict, said.why) == ("confirmed", "so") and missing_methods(found, other) == {"sft"}
    ((words, difference),) = said.differences
    assert words == "CHORD_PHI less GRPO, held-out, in points"
    assert math.isclose(difference.mean, 61 / 3)  # of 20, 21, 20, whose standard deviation is 1 / sqrt(3)
    assert math.isclose(difference.high - difference.mean, T_OF_2 / 3)


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        ([0.5, 0.1, 0.2, 0.3, 0.6, 0.8, 0.9, 0.9, 0.7, 0.6], "confirmed"),
        ([0.5, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.3, 0.3], "contradicted"),  # never back to where it began
        ([0.5, 0.1, 0.2, 0.3, 0.6, 0.6, 0.7, 0.7, 0.8, 0.9], "contradicted"),  # gains to the end
        ([0.5, 0.1, 0.2, 0.3, 0.6, 0.7, 0.9, 0.9, 0.9, 0.9], "not confirmed"),  # neither loses nor gains at the end
    ],
)
def test_shift_readapt_and_overfit_go_by_the_tuning_run(curve: list[float], said: str):
    found = result({"sft": [0.5, 0.5, 0.5]}, curve)
    assert findings(found, load_claims().claims)[0].verdict == said


def test_entropies_are_compared_at_the_same_steps():
    """Of 40 and 20 steps, an entropy that falls with the step alone: no method keeps more."""
    found = result({"chord_phi": [0.5, 0.5], "grpo": [0.5, 0.5]})
    for method, last in (("chord_phi", 20), ("grpo", 40)):
        for run in found["methods"][method]["runs"].values():
            steps = [*range(0, last + 1, 5), last + 3]
            run["curves"] |= {"step": steps, "entropy": [None, *(1 / step for step in steps[1:])]}
    claim = next(claim for claim in load_claims().claims if claim.sentence == "CHORD-phi keeps more entropy than GRPO.")
    ((_, difference),) = findings(found, [claim])[0].differences
    assert difference == (0.0, 0.0, 0.0)
    found["methods"]["grpo"]["runs"]["1"]["curves"]["entropy"][4] -= 0.5  # at step 20, the last that both have
    ((_, difference),) = findings(found, [claim])[0].differences
    assert math.isclose(difference.mean, 0.25)


def test_runs_of_several_commits_are_named_together():
    one, other = f"p 0.1.0, commit {'a' * 40}, torch 2", f"p 0.1.0, commit {'b' * 40}+, torch 2"
    assert shown_versions([one, other]) == "p 0.1.0, torch 2 (commit aaaaaaaaaaaa, bbbbbbbbbbbb+)"
    assert shown_versions(["torch 2", "torch 3"]) == "torch 2; torch 3"


def test_the_edges_of_a_grid_are_its_extremes_and_a_first_stage_counts():
    found = result({"sft": [0.5], "two": [0.5], "grpo": [0.5]})
    found["grid"] = ["0.0001", "1e-05", "0.001"]
    for method, rates in {"sft": (None, 1e-3), "two": (1e-3, 1e-4), "grpo": (None, 1e-4)}.items():
        found["methods"][method] |= dict(zip(("first_lr", "lr"), rates, strict=True))
        found["methods"][method]["grid"] = dict.fromkeys(found["grid"], 0.5)
    assert at_an_edge(found) == ["SFT", "TWO"]
    assert "| 0.001, then 0.0001 |" in page(found)


@pytest.mark.parametrize(
    ("phi", "said"),
    [
        ([0.8, 0.9, 0.85], "CHORD is ahead"),
        ([0.6, 0.5, 0.55], "CHORD is behind"),
        ([0.5, 0.9, 0.7], "no difference is shown"),
    ],
)
def test_the_page_says_who_is_ahead(phi: list[float], said: str):
    found = result({"grpo": [0.7, 0.71, 0.69], "chord_phi": phi})
    assert said in winner(found, "held-out") and said in " ".join(page(found).split())


def test_the_page_of_one_seed_has_no_interval_and_of_one_method_no_winner():
    text = page(result({"grpo": [0.7]}))
    assert "over 1 seed." in text and "inf" not in text and "is ahead" not in text
    assert "that others may be better: GRPO." in " ".join(text.split())
    assert "| GRPO | 70.0 | 70.0 | 70.0 |" in text and "- CHORD-mu ends above SFT, then RL." in text
    text = page(result({"grpo": [0.7], "chord_phi": [0.75]}))
    assert "| CHORD_PHI - GRPO | +5.0 | +5.0 | +5.0 |" in text and "onfirmed." in text
    assert shown_difference(Difference(0.017, -math.inf, math.inf)) == "+0.017"


def test_the_page_says_whether_the_tuning_run_is_one_of_those_that_are_measured():
    found = result({"grpo": [0.7, 0.6]})
    apart, among = ("".join(page({**found, "tuning_seed": seed}).split()) for seed in (0, 1))
    said = "isoneofthosethatitismeasuredon"
    assert said not in apart and said in among
    assert "seed0,whichisnotinthetable." in apart and "notinthetable" not in among


def test_what_an_experiment_lacks_is_said(tmp_path: Path):
    whole = yaml.safe_load(EXPERIMENTS[0].read_text(encoding="utf-8"))
    path = tmp_path / "e.yaml"

    def refused(change: dict[str, Any], **selection: Any) -> str:
        path.write_text(yaml.safe_dump({**whole, **change}), encoding="utf-8")
        with pytest.raises(UserError) as error:
            load_experiment(path, **selection)
        return str(error.value)

    assert f"{path} has no method nothing; it has chord_mu, chord_phi, " in refused({}, methods=["nothing"])
    assert "sft_then_grpo begins with sft, which has to be a method" in refused({}, methods=["sft_then_grpo"])
    assert f"{path}: grid: " in refused({"grid": []})
    assert "seeds has a value twice: [1, 1]" in refused({}, seeds=[1, 1])
    assert "Extra inputs are not permitted" in refused({"learning_rates": [1]})
    assert "expert_mark is no regular expression" in refused({"expert_mark": "[a-"})
    assert "grid.0: Input should be a finite number" in refused({"grid": [math.nan]})
    for name in ("base", "recipe", "settings", "a/b", "sft_first"):
        assert f"{name!r} names no method" in refused({"methods": {name: {"title": "T", "keys": {}}}})
    for content in (b"[", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            load_experiment(path)


@pytest.mark.parametrize(
    ("tested", "train", "sentence"),
    [
        ("best", {"max_loss_tokens": 9}, "has to set train.eval_steps"),
        ("latest", {"eval_steps": 5}, "has to set train.max_loss_tokens"),
        ("latest", {"max_loss_tokens": 9, "eval_steps": 5}, None),
        ("best", {"max_loss_tokens": 9, "eval_steps": 5, "save_steps": 5}, "has to set train.keep_best"),
        (
            "best",
            {"max_loss_tokens": 9, "eval_steps": 5, "save_steps": 2, "keep_best": True},
            "each evaluation is",
        ),
        ("best", {"max_loss_tokens": 9, "eval_steps": 6, "save_steps": 2, "keep_best": True}, None),
    ],
)
def test_a_recipe_has_what_is_read_of_its_runs(
    tmp_path: Path, tested: str, train: dict[str, Any], sentence: str | None
):
    recipe = tmp_path / "r.yaml"
    common = {"output_dir": "o", "global_batch_size": 8, "train_iters": 9}
    recipe.write_text(yaml.safe_dump({"model": {"path": "m"}, "train": {**common, **train}}), encoding="utf-8")
    changed = {"recipe": recipe, "tested_checkpoint": tested, "methods": {"a": Method(title="T", keys={})}}
    experiment = load_experiment(EXPERIMENTS[0]).model_copy(update=changed)
    if sentence is None:
        return experiment.check_recipe()
    with pytest.raises(UserError, match=sentence):
        experiment.check_recipe()


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


def numbers_of(question: str) -> tuple[str, ...]:
    """The first two, whichever comes first."""
    return tuple(sorted(re.findall(r"\d+", question)[:2]))


def test_a_second_stage_has_a_run_for_each_rate_of_its_first(tmp_path: Path):
    experiment = load_experiment(EXPERIMENTS[0])
    for chosen in (1e-3, 3e-3):
        one = make_trial(tmp_path, experiment, "sft_then_grpo", 1e-4, 2, {"sft": {chosen: 0.5}})
        assert one.directory == tmp_path / "sft_then_grpo" / f"lr_0.0001_after_{chosen:g}" / "seed_2"
        assert one.first and one.first.directory == tmp_path / "sft_then_grpo_first" / f"lr_{chosen:g}" / "seed_2"


def test_the_problems_in_words_and_their_reward():
    smollm2 = ROOT / "examples" / "smollm2"
    rows = runpy.run_path(str(smollm2 / "make_tasks.py"))["make_rows"](random.Random(0))
    reward = runpy.run_path(str(smollm2 / "reward.py"))["right_answer"]
    questions = {name: {row["prompt"] for row in found} for name, found in rows.items()}
    assert all(not questions[one] & questions[other] for one, other in combinations(questions, 2))
    solutions = {row["prompt"]: row["answer"] for row in rows["experts"]}
    sums = [str(sum(map(int, re.findall(r"\d+", question)))) for question in solutions]  # all are additions
    assert reward(["?"] * 400, [*solutions.values()], sums) == [1.0] * 400
    pairs = {name: {numbers_of(question) for question in found} for name, found in questions.items() if name != "test"}
    for part in ("held-out", "harder"):
        pairs[part] = {numbers_of(row["prompt"]) for row in rows["test"] if row["source"] == part}
    assert {name: len(found) for name, found in pairs.items()} == SMALL_PAIRS
    assert pairs["harder"] == pairs["held-out"] and pairs["experts"] == pairs["prompts"]
    assert all(not pairs[one] & pairs[other] for one, other in combinations(("prompts", "validation", "held-out"), 2))
    said = ["He has 12 + 7 = 19.", "19 of them, not 20", "It is Paris, of course.", "Lyon"]
    assert reward(["?"] * 4, said, ["19", "19", "Paris", "Paris"]) == [1.0, 0.0, 1.0, 0.0]


def test_claims_name_methods_and_measures_that_there_are():
    methods = load_experiment(EXPERIMENTS[0]).methods
    sides = [side for claim in load_claims().claims for one in claim.comparisons for side in one.sides]
    assert all(method in methods and measure in MEASURES for method, measure in sides)


@pytest.mark.parametrize("name", ["reproduction", "smollm2"])
def test_the_committed_page_is_what_its_numbers_say(name: str):
    folder = ROOT / "docs" / "evidence" / name
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (folder / "README.md").read_text(encoding="utf-8") == page(found)


def test_the_readme_counts_the_verdicts():
    found = json.loads((ROOT / "docs" / "evidence" / "reproduction" / "results.json").read_text(encoding="utf-8"))
    counts = Counter(finding.verdict for finding in findings(found, load_claims().claims))
    assert counts == {"confirmed": 1, "not confirmed": 2, "contradicted": 5}
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "one is confirmed, two are not, and five are contradicted" in said
