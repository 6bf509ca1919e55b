"""The history of a run read back from its log, and the numbers that sum it up."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chord_megatron.system.errors import UserError
from chord_megatron.tracking.findings import findings
from chord_megatron.tracking.progress import format_duration
from chord_megatron.tracking.run_log import METRICS_FILE, read_metrics
from chord_megatron.tracking.timers import PHASES

_DEEPEST = 3  # runs/my/checkpoints/step_2/state.json


@dataclass(frozen=True)
class History:
    """The lines of metrics.jsonl in order, training steps apart from evaluations."""

    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]

    def column(self, key: str) -> list[float]:
        """One number per training step; NaN where the metric is off or missing."""
        return [_number(record.get(key)) for record in self.steps]

    def known(self, key: str) -> list[float]:
        """The numbers of `column` without the NaNs."""
        return [value for value in self.column(key) if not math.isnan(value)]


@dataclass(frozen=True)
class EvalPoint:
    """A held-out mean reward of the weights after `step` training steps."""

    step: int
    reward: float


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers; None where nothing was logged."""

    steps: int
    first_eval: EvalPoint | None
    last_eval: EvalPoint | None
    best_eval: EvalPoint | None
    last_reward: float | None
    last_loss: float | None
    step_seconds: float  # in training steps, without evaluations, checkpoints and start-up
    rollout_tokens: int
    expert_tokens: int
    tokens_per_second: float | None  # mean over time, not over steps
    phase_seconds: dict[str, float]


def load_history(run_dir: Path) -> History:
    """Read metrics.jsonl of a run. Raises UserError when there is none, or it is empty or damaged."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        wrong = f"{run_dir} is a file" if run_dir.is_file() else f"{path} does not exist"
        raise UserError(f"{wrong}; give {run_around(run_dir) or 'the output directory of a training run'}")
    records = list(read_metrics(path))
    if not records:
        raise UserError(f"{path} is empty; the run ended before its first step or evaluation")
    return History(
        steps=tuple(record for record in records if "loss" in record),
        evaluations=tuple(record for record in records if "loss" not in record),
    )


def run_around(path: Path) -> str:
    """For a sentence: the run's directory that holds this path; "" where none does."""
    nearest = path.parents[:_DEEPEST]
    return next((f"the run's directory, {place}" for place in nearest if (place / METRICS_FILE).is_file()), "")


def eval_points(history: History) -> list[EvalPoint]:
    """The evaluations that have a mean reward, by step; a repeated one counts once, as last written."""
    rewards = {record["step"]: record.get("eval_reward_mean") for record in history.evaluations}
    return [EvalPoint(step, reward) for step, reward in sorted(rewards.items()) if reward is not None]


def summarize_history(history: History) -> Summary:
    """The numbers that sum up a history."""
    points = eval_points(history)
    rewards, losses = history.known("reward_mean"), history.known("loss")
    return Summary(
        steps=len(history.steps),
        first_eval=points[0] if points else None,
        last_eval=points[-1] if points else None,
        best_eval=max(points, key=lambda point: point.reward, default=None),
        last_reward=rewards[-1] if rewards else None,
        last_loss=losses[-1] if losses else None,
        step_seconds=sum(history.known("time_step")),
        rollout_tokens=int(sum(history.known("num_rollout_tokens"))),
        expert_tokens=int(sum(history.known("num_expert_tokens"))),
        tokens_per_second=_time_weighted(history, "tokens_per_second"),
        phase_seconds={phase: sum(history.known(f"time_{phase}")) for phase in PHASES},
    )


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """The summary as (label, text) pairs for a table; what was not logged has no row."""
    evals = (("First", summary.first_eval), ("Last", summary.last_eval), ("Best", summary.best_eval))
    rows = [("Training steps", f"{summary.steps:,}")]
    rows += [(f"{name} eval reward", f"{p.reward:.4f} (step {p.step})") for name, p in evals if p is not None]
    if summary.last_reward is not None:
        rows.append(("Last training reward", f"{summary.last_reward:.4f}"))
    if summary.last_loss is not None:
        rows.append(("Last loss", f"{summary.last_loss:.4f}"))
    rows.append(("Time in steps", format_duration(summary.step_seconds)))
    rows.append(("Rollout tokens trained on", f"{summary.rollout_tokens:,}"))
    rows.append(("Expert tokens trained on", f"{summary.expert_tokens:,}"))
    if summary.tokens_per_second is not None:
        rows.append(("Tokens per second", f"{summary.tokens_per_second:,.0f}"))
    if summary.step_seconds > 0:
        split = (f"{phase} {s / summary.step_seconds:.0%}" for phase, s in summary.phase_seconds.items() if s)
        rows.append(("Time split", ", ".join(split)))
    return rows


def print_summary(run_dir: Path, console: Console) -> None:
    """Print the summary of a run as a table, and what its curves suggest. Raises UserError when it has no metrics."""
    history = load_history(run_dir)
    table = Table(title=Text(run_dir.resolve().name), show_header=False)
    for row in summary_rows(summarize_history(history)):
        table.add_row(*row)
    console.print(table)
    for sentence in findings(history.steps):
        console.print(f"- {sentence}", markup=False, highlight=False)


def summary_document(run_dir: Path) -> dict[str, Any]:
    """The same as one JSON object. Raises UserError when the run has no metrics."""
    history = load_history(run_dir)
    return {
        "run": run_dir.resolve().name,
        "summary": asdict(summarize_history(history)),
        "findings": findings(history.steps),
    }


def _number(value: float | int | None) -> float:
    return math.nan if value is None else float(value)


def _time_weighted(history: History, key: str) -> float | None:
    pairs = zip(history.column(key), history.column("time_step"))
    known = [(value, seconds) for value, seconds in pairs if not math.isnan(value) and seconds > 0]
    total = sum(seconds for _, seconds in known)
    return sum(value * seconds for value, seconds in known) / total if total > 0 else None
