"""What the runs of an experiment have found: one document of numbers, from their logs and tests."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from experiment import Experiment, Trial, chosen_lr

from chord_megatron.tracking.summary import History, load_history

# Of the steps between two evaluations, the mean; of an evaluation, the number.
OF_STEPS = ("reward_mean", "response_length_mean", "entropy", "phi_mean", "mu", "loss_expert")
VALIDATION = "eval_reward_mean"
OF_EVALUATIONS = (VALIDATION, "eval_response_length_mean")


def result_file(directory: Path) -> Path:
    """The result on the test set, as `chord-megatron evaluate --json` printed it."""
    return directory / "test.json"


def completions_file(directory: Path) -> Path:
    """The answers on the test set."""
    return directory / "completions.test.jsonl"


def made_with(run: Path) -> str:
    """The versions at the head of its config.yaml."""
    first = (run / "config.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("# ")


def collect(
    experiment: Experiment,
    base: Path,
    grid: Mapping[str, Mapping[float, float]],
    tuning: Mapping[str, Trial],
    trials: Sequence[Trial],
) -> dict[str, Any]:
    """All numbers, for JSON.

    base: the folder of its test. grid: validation rewards by method and learning rate. tuning: the run of each method
    by which its learning rate was chosen.
    """
    methods: dict[str, Any] = {}
    for name, method in experiment.methods.items():
        found = grid[name]
        methods[name] = {
            "title": method.title,
            "is_chord": method.is_chord,
            "keys": method.keys,
            "first": method.first,
            "grid": {f"{lr:g}": reward for lr, reward in found.items()},
            "lr": chosen_lr(found),
            "first_lr": chosen_lr(grid[method.first]) if method.first else None,
            "tuning_validation": curves([load_history(one.directory) for one in tuning[name].stages])[VALIDATION],
            "runs": {},
        }
    for trial in trials:
        methods[trial.method]["runs"][str(trial.seed)] = of_run(trial, experiment)
    return {
        "title": experiment.title,
        "setting": experiment.setting,
        "seeds": experiment.seeds,
        "grid": [f"{lr:g}" for lr in experiment.grid],
        "budget": experiment.budget,
        "tuning_seed": experiment.tuning_seed,
        "tested_checkpoint": experiment.tested_checkpoint,
        "base": of_test(base, experiment.expert_mark),
        "methods": methods,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "made_with": sorted({made_with(trial.directory) for trial in [*tuning.values(), *trials]}),
    }


def of_run(trial: Trial, experiment: Experiment) -> dict[str, Any]:
    """One run behind its first stage: what it took, what it reached, its curves."""
    histories = [load_history(one.directory) for one in trial.stages]
    steps = [step for history in histories for step in history.steps]
    return {
        "steps": len(steps),
        "rollout_tokens": sum(step["num_rollout_tokens"] for step in steps),
        "expert_tokens": sum(step["num_expert_tokens"] for step in steps),
        "seconds_of_steps": round(sum(step["time_step"] for step in steps), 1),
        "first_step": {key: steps[0][key] for key in ("loss_rollout", "loss_expert", "grad_norm")},
        "evaluations": [len(history.evaluations) - 1 for history in histories],  # before the first step apart
        "validation": trial.validation(experiment.tested_checkpoint),
        **of_test(trial.directory, experiment.expert_mark),
        "curves": curves(histories),
    }


def of_test(directory: Path, expert_mark: str) -> dict[str, Any]:
    """By source: the mean reward, the mean length, the share of completions in the experts' notation."""
    sources = json.loads(result_file(directory).read_text(encoding="utf-8"))["sources"]
    mark = re.compile(expert_mark)
    marked: dict[str, list[bool]] = {}
    _, *lines = completions_file(directory).read_text(encoding="utf-8").splitlines()  # the first has the settings
    for row in map(json.loads, lines):
        marked.setdefault(row["source"], []).extend(bool(mark.search(one["completion"])) for one in row["completions"])
    return {
        "reward": {name: found["metrics"]["reward_mean"]["value"] for name, found in sources.items()},
        "length": {name: found["metrics"]["response_length_mean"]["value"] for name, found in sources.items()},
        "in_expert_style": {name: fmean(found) for name, found in marked.items()},
    }


def curves(histories: Sequence[History]) -> dict[str, list[float | None]]:
    """By the tokens that had a loss: at each evaluation its numbers, and the means of the steps since the last one."""
    found: dict[str, list[float | None]] = {key: [] for key in ("tokens", "step", *OF_EVALUATIONS, *OF_STEPS)}
    tokens_before, steps_before = 0, 0
    for history in histories:
        spent = [step["num_rollout_tokens"] + step["num_expert_tokens"] for step in history.steps]
        total = [0, *accumulate(spent)]
        for last, evaluation in pairwise([None, *history.evaluations]):
            at = evaluation["step"]
            since = history.steps[(last["step"] if last else at) : at]
            found["tokens"].append(tokens_before + total[at])
            found["step"].append(steps_before + at)
            for key in OF_EVALUATIONS:
                found[key].append(evaluation.get(key))
            for key in OF_STEPS:
                values = [step[key] for step in since if step.get(key) is not None]
                found[key].append(round(fmean(values), 6) if values else None)
        tokens_before, steps_before = tokens_before + total[-1], steps_before + len(history.steps)
    return found
