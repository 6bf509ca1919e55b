"""What the report says of the curves: each rule speaks where its threshold is passed, and is silent elsewhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from chord_megatron.tracking.findings import RULES, Rule, findings
from chord_megatron.tracking.report import NOTHING_TO_SAY, write_report
from chord_megatron.tracking.run_log import RunLog

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
FIRST = 10  # step of the first row
# Rows in which a rule holds from their third on, and such in which none does: (rule, beyond it, at its border).
CASES = {
    ("mu", "at", 0): (0.0, 1e-9),
    ("mu", "at", 1): (1.0, 0.999),
    ("phi_mean", "below", 0.01): (0.0099, 0.01),
    ("expert_p/0.0", "above", 0.5): (0.51, 0.5),
    ("gradient_cosine", "below", -0.1): (-0.11, -0.1),
    ("gradient_share", "above", 0.95): (0.96, 0.95),
    ("gradient_share", "below", 0.05): (0.04, 0.05),
    ("entropy", "below", 0.1): (0.19, 0.2),  # of 2.0, the first value
    ("zero_std_fraction", "at", 1): (1.0, 0.99),
    ("idle_row_fraction", "above", 0.75): (0.76, 0.75),
    ("effective_sample_size", "below", 0.5): (0.49, 0.5),
    ("truncated_fraction", "above", 0.5): (0.51, 0.5),
}


def rows_of(metric: str, values: list[float | None]) -> list[dict[str, Any]]:
    return [{"step": FIRST + index, "loss": 0.5, metric: value} for index, value in enumerate(values)]


def key_of(rule: Rule) -> tuple[str, str, float]:
    return rule.metric, rule.side, rule.threshold


def start_of(rule: Rule) -> float:
    """A value at which the rule is silent."""
    return 2.0 if rule.of_first else CASES[key_of(rule)][1]


def test_every_rule_has_a_case():
    assert [key_of(rule) for rule in RULES] == list(CASES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.metric} {rule.condition}")
def test_a_rule_speaks_beyond_its_threshold_and_not_at_it(rule: Rule):
    beyond, border = CASES[key_of(rule)]
    quiet = [start_of(rule)] * 2
    said = rule.says(rows_of(rule.metric, [*quiet, *[beyond] * rule.lasting]))
    assert said == f"{rule.metric} {rule.condition} since step {FIRST + 2}: {rule.sentence}"
    for values in (
        [*quiet, *[border] * rule.lasting],
        [*quiet, *[beyond] * (rule.lasting - 1)],  # not for long enough
        [*quiet, *[beyond] * rule.lasting, start_of(rule)],  # no longer
        [None] * 9,
        [],
    ):
        assert rule.says(rows_of(rule.metric, values)) is None


def test_a_break_starts_it_anew_and_steps_without_a_number_do_not():
    rule = Rule("mu", "at", 0, 2, "words.")
    assert rule.since(rows_of("mu", [0.0, 0.0, 0.5, 0.0, None, 0.0])) == FIRST + 3
    assert rule.since([{"step": 0, "loss": 1.0}, *rows_of("mu", [0.0, 0.0])]) == FIRST


def test_equal_rewards_that_the_kl_in_them_tells_apart_are_no_finding():
    """With grpo.kl_in_reward advantages differ where rewards do not, which idle_row_fraction shows."""
    equal = [{"step": step, "zero_std_fraction": 1.0, "idle_row_fraction": float(step < 2)} for step in range(9)]
    assert findings(equal) == []
    assert [said.split(":")[0] for said in findings([row | {"idle_row_fraction": 1.0} for row in equal])] == [
        "zero_std_fraction at 1 since step 0",
        "idle_row_fraction above 0.75 since step 0",
    ]
    without = [{key: value for key, value in row.items() if key != "idle_row_fraction"} for row in equal]
    assert len(findings(without)) == 1  # of an older run


def test_numbers_that_are_none_hold_nothing():
    assert all(rule.says(rows_of(rule.metric, [math.nan] * 9)) is None for rule in RULES)


def test_a_healthy_run_has_no_findings():
    healthy = {"mu": 0.3, "phi_mean": 0.1, "expert_p/0.0": 0.2, "gradient_cosine": 0.1, "gradient_share": 0.4}
    healthy |= {"entropy": 1.0, "zero_std_fraction": 0.3, "idle_row_fraction": 0.3}
    healthy |= {"effective_sample_size": 0.99, "truncated_fraction": 0.1}
    assert {rule.metric for rule in RULES} == set(healthy)
    assert findings([{"step": step, **healthy} for step in range(20)]) == []


def and_at(rule: Rule) -> str:
    return f", and `{rule.only_at[0]}` not below it" if rule.only_at else ""


def test_the_docs_have_every_threshold():
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    for rule in RULES:
        (row,) = [line for line in lines if line.startswith(f"| `{rule.metric}` {rule.condition}{and_at(rule)} |")]
        assert row.split("|")[2].strip() == str(rule.lasting)


def write_run(run_dir: Path, **metrics: float) -> None:
    with RunLog(run_dir, train_iters=6, report_to=()) as log:
        for step in range(6):
            log.log_step({"step": step, "loss": 0.5, "time_step": 1.0, **metrics})


def test_the_report_says_it(tmp_path: Path):
    write_run(tmp_path, zero_std_fraction=1.0, entropy=0.5)
    _, html = write_report(tmp_path)
    page = html.read_text(encoding="utf-8")
    assert "<h2>What the curves suggest</h2>\n<ul><li>zero_std_fraction at 1 since step 0: no group has" in page
    assert page.count("<li>") == 1


def test_a_report_with_nothing_to_say_says_so(tmp_path: Path):
    write_run(tmp_path, entropy=0.5)
    _, html = write_report(tmp_path)
    assert f"<ul><li>{NOTHING_TO_SAY}</li></ul>" in html.read_text(encoding="utf-8")
