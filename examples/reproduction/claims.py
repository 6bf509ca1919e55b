"""The claims of claims.yaml, held against what the runs have found. Pure: numbers in, verdicts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict
from seeds import Difference, paired_difference

Results = Mapping[str, Any]
Run = Mapping[str, Any]
Measure = Callable[[Run, Results, int], float]  # of a run, of its method's record, of steps that both sides took
HELD_OUT, HARDER, NOT_TRAINED = "held-out", "harder", "not trained"  # sources of a test set


class Comparison(BaseModel):
    """A difference between two numbers of runs of the same seed, which a claim says is above 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    ours: str
    measure: str
    theirs: str
    other: str | None = None  # their measure; null: the same

    @property
    def sides(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Method and measure of each."""
        return (self.ours, self.measure), (self.theirs, self.other or self.measure)


class Why(BaseModel):
    """Of each verdict, what it may come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    confirmed: str
    not_confirmed: str
    contradicted: str


class Claim(BaseModel):
    """A sentence of the paper's, the differences that it comes to here, and by verdict what that may come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sentence: str
    comparisons: list[Comparison]
    why: Why


class Claims(BaseModel):
    """What claims.yaml holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    claims: list[Claim]
    not_testable: list[str]


@dataclass(frozen=True)
class Finding:
    """A claim with what was measured."""

    sentence: str
    differences: Sequence[tuple[str, Difference]]  # what each is of
    verdict: str
    why: str


def load_claims() -> Claims:
    """Those of the paper."""
    return Claims.model_validate(yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")))


def findings(results: Results, claims: Sequence[Claim]) -> list[Finding]:
    """Of the claims all of whose methods were run."""
    found = []
    for claim in claims:
        if not missing_methods(results, claim):
            differences = [(described(results, one), measured(results, one)) for one in claim.comparisons]
            said = verdict([difference for _, difference in differences])
            found.append(Finding(claim.sentence, differences, said, getattr(claim.why, said.replace(" ", "_"))))
    return found


def missing_methods(results: Results, claim: Claim) -> set[str]:
    """That it speaks of, and were not run."""
    return {method for one in claim.comparisons for method, _ in one.sides} - set(results["methods"])


def verdict(differences: Sequence[Difference]) -> str:
    """confirmed: every interval is above 0; contradicted: one is below; else not confirmed."""
    signs = [difference.sign for difference in differences]
    if all(sign > 0 for sign in signs):
        return "confirmed"
    return "contradicted" if any(sign < 0 for sign in signs) else "not confirmed"


def runs_of(results: Results, method: str) -> list[Run]:
    """In the order of their seeds; of the base the same for each."""
    if method == "base":
        return [results["base"]] * len(results["seeds"])
    return [results["methods"][method]["runs"][str(seed)] for seed in results["seeds"]]


def titled(results: Results, method: str) -> str:
    """As it stands in the table."""
    return "base" if method == "base" else str(results["methods"][method]["title"])


def rewards(results: Results, method: str, source: str) -> list[float]:
    """The mean reward on one part of the test set, by seed."""
    return [run["reward"][source] for run in runs_of(results, method)]


def fifths(values: Sequence[float | None]) -> list[float]:
    """The means of a curve's five fifths, what is missing left out."""
    count = len(values)
    parts = [values[count * place // 5 : max(count * (place + 1) // 5, count * place // 5 + 1)] for place in range(5)]
    return [fmean(known) if (known := [value for value in part if value is not None]) else 0.0 for part in parts]


def lowest(run: Run, of: Results, _: int) -> float:
    """Validation at the step where it was lowest in the run by which the method was tuned: not in this one."""
    tuned, values = of["tuning_validation"], run["curves"]["eval_reward_mean"]
    return float(values[min(tuned.index(min(tuned)), len(values) - 1)])


def best_of_fifths(count: int) -> Measure:
    """Validation in that of the first fifths that was the best of the run by which the method was tuned."""

    def measure(run: Run, of: Results, _: int) -> float:
        tuned = fifths(of["tuning_validation"])[:count]
        return fifths(run["curves"]["eval_reward_mean"])[tuned.index(max(tuned))]

    return measure


def late_entropy(run: Run, _: Results, steps: int) -> float:
    """Of rollouts, in the last fifth of so many steps."""
    steps_and_entropies = zip(run["curves"]["step"], run["curves"]["entropy"], strict=True)
    return fmean(entropy for step, entropy in steps_and_entropies if 0.8 * steps < step <= steps)


def reward_on(source: str) -> Measure:
    """Of one part of the test set."""
    return lambda run, *_: run["reward"][source]


ENTROPY, LENGTH = "entropy of rollouts in the last fifth of the steps that both took", "length of held-out answers"
MEASURES: dict[str, Measure] = {
    **{source: reward_on(source) for source in (HELD_OUT, HARDER, NOT_TRAINED)},
    "validation before the first step": lambda run, *_: run["curves"]["eval_reward_mean"][0],
    "validation where the tuning run was lowest": lowest,
    "validation in the best fifth": best_of_fifths(5),
    "validation in the best of the first four fifths": best_of_fifths(4),
    "validation in the last fifth": lambda run, *_: fifths(run["curves"]["eval_reward_mean"])[4],
    ENTROPY: late_entropy,
    LENGTH: lambda run, *_: run["length"][HELD_OUT],
}
UNITS = {ENTROPY: (1, "nats"), LENGTH: (1, "tokens")}


def unit(measure: str) -> tuple[float, str]:
    """What it is multiplied by to be shown, and the name of that."""
    return UNITS.get(measure, (100, "points"))


def last_common_step(runs: Sequence[Run]) -> int:
    """The last one that all of them were evaluated at."""
    return max(set.intersection(*(set(run["curves"]["step"]) for run in runs)))


def measured(results: Results, comparison: Comparison) -> Difference:
    """The paired difference over the seeds, in the unit of the measure."""
    scale, _ = unit(comparison.measure)
    pairs = list(zip(*(runs_of(results, method) for method, _ in comparison.sides), strict=True))
    sides = [
        [scale * MEASURES[measure](runs[place], results["methods"][method], last_common_step(runs)) for runs in pairs]
        for place, (method, measure) in enumerate(comparison.sides)
    ]
    return paired_difference(*sides)


def described(results: Results, comparison: Comparison) -> str:
    """In words."""
    (ours, measure), (theirs, other) = comparison.sides
    of = f"in {unit(measure)[1]}"
    if ours == theirs:
        return f"{titled(results, ours)}, {measure} less {other}, {of}"
    return f"{titled(results, ours)} less {titled(results, theirs)}, {measure}, {of}"
