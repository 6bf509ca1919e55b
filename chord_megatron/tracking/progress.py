"""What a run says while it goes on: a line for each step, and on a terminal bars below them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from chord_megatron.system.sentences import fitted
from chord_megatron.system.work import Work
from chord_megatron.tracking.timers import PHASES
from chord_megatron.types import Metrics

RECENT_STEPS = 20  # steps whose mean duration predicts the rest

# In the order of the line. A metric that is off (None) leaves no field behind.
_FIELDS = (
    ("reward_mean", "reward {:.3f}"),
    ("mu", "mu {:.3f}"),
    ("phi_mean", "phi {:.3f}"),
    ("loss", "loss {:.4f}"),
    ("kl", "KL {:.4f}"),
    ("entropy", "entropy {:.3f}"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
)


class ProgressLine:
    """Prints one line per step, whole in a file; on a terminal broken between fields, above bars of run and phase."""

    def __init__(self, train_iters: int, stream: TextIO | None = None, *, first_step: int = 0) -> None:
        self._train_iters = train_iters
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._console = Console(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=True)
        # Not Console.is_terminal: FORCE_COLOR, common in CI, makes that true for files as well.
        in_place = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._bars = _Bars(self._console, first_step, train_iters) if in_place else None

    def update(self, metrics: Metrics) -> None:
        """Show the metrics of a finished step."""
        if metrics.get("time_step") is not None:
            self._recent.append(metrics["time_step"] or 0.0)
        step = int(metrics["step"] or 0)
        eta = self._eta(step)
        self.fields(step_fields(metrics, self._train_iters, eta))
        if self._bars is not None:
            self._bars.show_run(step + 1, self._train_iters, eta)

    def fields(self, fields: Sequence[str]) -> None:
        """Print them on a line, on a terminal on as many as they need."""
        self._console.print(" | ".join(fields) if self._bars is None else _broken(fields, self._console.width))

    def waiting(self, work: Work, line: str, is_due: bool) -> None:
        """Say how far a phase is: in its bar, and where there is none in a line of its own, when that is due."""
        if self._bars is not None:
            self._bars.show_phase(work, line)
        elif is_due:
            self.message(line)

    def message(self, text: str) -> None:
        """Print a plain line, above the bars where there are any."""
        self._console.print(text if self._bars is None else fitted(text, self._console.width))

    def close(self) -> None:
        """Give the terminal back."""
        if self._bars is not None:
            self._bars.stop()

    def _eta(self, step: int) -> float | None:
        if not self._recent:
            return None
        return sum(self._recent) / len(self._recent) * (self._train_iters - step - 1)


class _Bars:
    """The live area: how far the run is, and its phase. It leaves nothing behind.

    It begins when there is something to show, so that it stays clear of start-up logs; and not again once stopped,
    also where another thread still has something to show.
    """

    def __init__(self, console: Console, step: int, train_iters: int) -> None:
        self._progress = Progress(
            BarColumn(bar_width=16),
            # It has the room that the bar leaves, and is cut where that is too little; without that the bar gives way.
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            console=console,
            expand=True,
            refresh_per_second=2,
            transient=True,
        )
        self._run = self._progress.add_task("", total=train_iters)
        self._phase = self._progress.add_task("", total=None, visible=False)
        self._lock, self._is_stopped = threading.Lock(), False
        self._progress.update(self._run, completed=step, description=f"{step} of {train_iters} steps")

    def show_run(self, done: int, train_iters: int, eta: float | None) -> None:
        """`done` of the steps; `eta` in seconds."""
        ending = "" if eta is None else f", ETA {format_duration(eta)}"
        self._begin()
        said = f"{done} of {train_iters} steps{ending}"
        self._progress.update(self._run, completed=done, description=said, refresh=True)

    def show_phase(self, work: Work, line: str) -> None:
        """A phase of which nothing is counted has a bar that moves."""
        self._begin()
        self._progress.update(
            self._phase, completed=work.done, total=work.total or None, description=line, visible=True
        )

    def stop(self) -> None:
        """Safe to call twice."""
        with self._lock:
            self._is_stopped = True
            self._progress.stop()

    def _begin(self) -> None:
        with self._lock:
            if not self._is_stopped:
                self._progress.start()


def step_fields(metrics: Metrics, train_iters: int, eta: float | None) -> list[str]:
    """What is said of a finished step, numbered as in metrics.jsonl. `eta` is in seconds."""
    step = int(metrics["step"] or 0)
    fields = [f"step {step} ({step + 1} of {train_iters})"]
    if eta is not None:
        fields.append(f"ETA {format_duration(eta)}")
    for key, template in _FIELDS:
        value = metrics.get(key)
        if value is not None:
            fields.append(template.format(value) + (_loss_parts(metrics) if key == "loss" else ""))
    if metrics.get("skipped_steps"):
        fields.append(f"skipped {metrics['skipped_steps']}")
    if metrics.get("reward_errors"):
        fields.append(f"reward errors {metrics['reward_errors']}")
    if metrics.get("time_step"):
        fields.append(_time_split(metrics))
    return fields


def _broken(fields: Sequence[str], width: int) -> str:
    """The fields on as many lines as they need, none of them cut."""
    lines = [fields[0]]
    for field in fields[1:]:
        if len(lines[-1]) + len(" | ") + len(field) <= width:
            lines[-1] += f" | {field}"
        else:
            lines.append(f"    {field}")
    return "\n".join(lines)


def format_duration(seconds: float) -> str:
    """`12.3 s` below a minute, `1:02:03` above."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _loss_parts(metrics: Metrics) -> str:
    parts = ((name, metrics.get(f"loss_{name}")) for name in ("rollout", "expert"))
    shown = " / ".join(f"{name} {value:.4f}" for name, value in parts if value is not None)
    return f" ({shown})" if shown else ""


def _time_split(metrics: Metrics) -> str:
    total = metrics["time_step"] or 0.0
    seconds = ((phase, metrics.get(f"time_{phase}")) for phase in PHASES)
    shares = " ".join(f"{phase} {value / total:.0%}" for phase, value in seconds if value)
    return f"{total:.1f} s/step: {shares}" if shares else f"{total:.1f} s/step"
