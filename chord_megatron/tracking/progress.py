"""The live line: one line that says how training goes."""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

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
    """Prints one line per step: updated in place on a terminal, plain text lines anywhere else."""

    def __init__(self, train_iters: int, stream: TextIO | None = None) -> None:
        self._train_iters = train_iters
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._console = Console(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=True)
        # Not Console.is_terminal: FORCE_COLOR, common in CI, makes that true for files as well.
        self._in_place = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._live: Live | None = None

    def update(self, metrics: Metrics) -> None:
        """Show the metrics of a finished step."""
        if metrics.get("time_step") is not None:
            self._recent.append(metrics["time_step"] or 0.0)
        line = format_step(metrics, self._train_iters, self._eta(int(metrics["step"] or 0)))
        if not self._in_place:
            self.message(line)
            return
        if self._live is None:  # started late, so that it stays clear of start-up logs
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def message(self, text: str) -> None:
        """Print a plain line, above the live line where there is one."""
        self._console.print(text)

    def close(self) -> None:
        """Leave the last line standing and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _eta(self, step: int) -> float | None:
        if not self._recent:
            return None
        return sum(self._recent) / len(self._recent) * (self._train_iters - step - 1)


def format_step(metrics: Metrics, train_iters: int, eta: float | None) -> str:
    """One line for a finished step; the end is what a narrow terminal cuts. `eta` is in seconds."""
    fields = [f"step {int(metrics['step'] or 0) + 1}/{train_iters}"]
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
    return " | ".join(fields)


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
