"""The log of one run: metrics.jsonl, completions.jsonl, experts.jsonl, its trackers and the console."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from chord_megatron.system.errors import UserError
from chord_megatron.system.files import JsonLines, filter_json_lines, finite, read_json_lines
from chord_megatron.system.sentences import shown
from chord_megatron.system.work import Work
from chord_megatron.tracking.expert_rows import read_visits
from chord_megatron.tracking.progress import Metrics, ProgressLine
from chord_megatron.tracking.step_metrics import ExpertRow
from chord_megatron.tracking.trackers.background import BackgroundTracker
from chord_megatron.tracking.trackers.opening import open_trackers
from chord_megatron.tracking.trackers.protocol import TrackedRun

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
EXPERTS_FILE = "experts.jsonl"
LOG_FILES = (METRICS_FILE, COMPLETIONS_FILE, EXPERTS_FILE)
_LARGEST = 1e300  # of a metric; curves are drawn of them


class RunLog:
    """Writes what a run reports; used by global rank 0 only. Also a context manager that closes itself.

    `resume_step` is the next step of a run that goes on (None: a new run): whatever the interrupted
    run logged from there on is dropped, because it will be written again. `last_eval_step` is the step of
    the newest evaluation kept, so that a resumed run need not repeat it; `rewards`, those of all of them by step;
    `loss_tokens`, how many tokens have had a loss.
    `tracked`: what trackers are told of the run.
    Raises UserError when a new run finds the metrics of another one in `run_dir`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        train_iters: int,
        report_to: Sequence[str] = ("tensorboard",),
        resume_step: int | None = None,
        tracked: TrackedRun | None = None,
        stream: TextIO | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        evaluations, self.loss_tokens = _prepare(run_dir, resume_step)
        last_eval = evaluations[-1] if evaluations else None
        self.rewards: dict[int, float] = {}
        for record in evaluations:
            self._note_reward(record["step"], record)
        self.last_eval_step: int | None = None if last_eval is None else last_eval["step"]
        self._metrics = JsonLines(run_dir / METRICS_FILE)
        self._completions = JsonLines(run_dir / COMPLETIONS_FILE)
        self._first_log_probs = _first_log_probs(run_dir / EXPERTS_FILE)
        self._experts = JsonLines(run_dir / EXPERTS_FILE)
        self._progress = ProgressLine(train_iters, stream, first_step=resume_step or 0)
        tracked = dataclasses.replace(tracked or TrackedRun(run_dir), resume_step=resume_step)
        self._trackers = open_trackers(report_to, tracked, self.message)
        if last_eval is not None and last_eval["step"] == resume_step:
            self._write_scalars(last_eval)  # TensorBoard purged it along with the training step of that number

    def log_step(self, metrics: Metrics) -> None:
        """Record a finished training step; `metrics` holds at least `step` (from 0) and `loss`."""
        assert "step" in metrics and "loss" in metrics, sorted(metrics)
        errors = [tracker.errors for tracker in self._trackers if isinstance(tracker, BackgroundTracker)]
        metrics = {**metrics, "tracker_errors": sum(errors)} if errors else metrics
        self._metrics.write(metrics)
        self.loss_tokens += _loss_tokens(metrics)
        self._write_scalars(metrics)
        self._progress.update(metrics)

    def log_eval(self, step: int, metrics: Metrics) -> None:
        """Record an evaluation of the weights after `step` training steps, as a line without `loss`."""
        assert "loss" not in metrics, sorted(metrics)
        record = {"step": step, **metrics}
        self._metrics.write(record)
        self._write_scalars(record)
        self.last_eval_step = step
        self._note_reward(step, metrics)
        shown = (f"{k.removeprefix('eval_')} {v:.4g}" for k, v in metrics.items() if v is not None)
        self._progress.fields([f"eval at step {step}", *shown])

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record sampled completions of a training step or an evaluation, one line each."""
        for row in rows:
            self._completions.write({"step": step, **row})
        if rows:
            tag = "eval/completions" if rows[0].get("split") == "eval" else "completions"
            for tracker in self._trackers:
                tracker.table(step, tag, finite(rows))

    def log_experts(self, step: int, rows: Sequence[ExpertRow]) -> None:
        """Record the expert rows of a training step, one line each, with the log-prob lost since their first one."""
        for row in rows:
            if finite(row.log_prob) is not None:
                self._first_log_probs.setdefault(row.id, row.log_prob)
            shift = self._first_log_probs.get(row.id, math.nan) - row.log_prob
            self._experts.write({"step": step, **row._asdict(), "shift": shift})

    def message(self, text: str) -> None:
        """Print a line to the console without breaking the bars."""
        self._progress.message(text)

    def waiting(self, work: Work, line: str, is_due: bool) -> None:
        """Say on the console how far a phase is; from any thread."""
        self._progress.waiting(work, line, is_due)

    def track_text(self, step: int, tag: str, text: str) -> None:
        """Some lines for trackers, which the console and the report have already."""
        for tracker in self._trackers:
            tracker.text(step, tag, text)

    def track_artifact(self, path: Path) -> None:
        """A file of the run directory for trackers."""
        for tracker in self._trackers:
            tracker.artifact(path)

    def close(self, *, failed: bool = False) -> None:
        """Close the files and give the terminal back; trackers show how the run ended."""
        self._progress.close()
        self._metrics.close()
        self._completions.close()
        self._experts.close()
        for tracker in self._trackers:
            tracker.close(failed=failed)
        self._trackers = []

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def _note_reward(self, step: int, metrics: Metrics) -> None:
        reward = metrics.get("eval_reward_mean")
        if reward is not None and math.isfinite(reward):
            self.rewards[step] = reward

    def _write_scalars(self, record: Metrics) -> None:
        values = {
            curve_tag(key): value
            for key, value in record.items()
            if key != "step" and value is not None and math.isfinite(value)
        }
        step = record["step"]
        assert step is not None
        for tracker in self._trackers:
            tracker.scalars(int(step), values)


def curve_tag(key: str) -> str:
    """The metric's name in trackers, which make one section of each prefix before a slash."""
    if "/" in key:
        return key
    for section in ("eval", "time"):
        if key.startswith(f"{section}_"):
            return f"{section}/{key.removeprefix(f'{section}_')}"
    return f"train/{key}"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl: a step, and numbers or None. Raises UserError naming the line."""
    for line, record in enumerate(read_json_lines(path), start=1):
        for key, value in record.items():
            if value is not None and (type(value) not in (int, float) or not abs(value) < _LARGEST):
                raise UserError(f"line {line} of {path}: {shown(key)} is no number; remove that line")
        yield record


def _prepare(run_dir: Path, resume_step: int | None) -> tuple[list[dict[str, Any]], int]:
    """Drop what a resumed run writes again; returns the evaluations that stay, and the tokens of the steps that do."""
    metrics, completions = run_dir / METRICS_FILE, run_dir / COMPLETIONS_FILE
    if resume_step is None:
        if metrics.exists() and metrics.stat().st_size > 0:
            raise UserError(f"{run_dir} holds the metrics of another run; resume that run or choose another output_dir")
        return [], 0
    # The evaluation at step k comes before training step k, so it outlives a resume at k.
    filter_json_lines(metrics, lambda record: record["step"] < resume_step + ("loss" not in record))
    evaluations, loss_tokens = [], 0
    for record in read_metrics(metrics):
        if "loss" in record:
            loss_tokens += _loss_tokens(record)
        else:
            evaluations.append(record)
    evaluated = {record["step"] for record in evaluations}
    filter_json_lines(
        completions,
        lambda row: row["step"] in evaluated if row.get("split") == "eval" else row["step"] < resume_step,
    )
    filter_json_lines(run_dir / EXPERTS_FILE, lambda row: row["step"] < resume_step)
    return evaluations, loss_tokens


def _loss_tokens(metrics: Metrics) -> int:
    """Of one step."""
    return sum(int(metrics.get(key) or 0) for key in ("num_rollout_tokens", "num_expert_tokens"))


def _first_log_probs(path: Path) -> dict[int, float]:
    """Of each expert row that was trained on, by row number. Raises UserError naming the line."""
    return {visit.id: visit.log_prob for visit in reversed(read_visits(path)) if not math.isnan(visit.log_prob)}
