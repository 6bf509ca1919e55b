"""mu of each step, and what a closed loop knows of the steps before."""

from __future__ import annotations

from typing import Any

from chord_megatron.algorithm.mu import StepHistory
from chord_megatron.config import Config
from chord_megatron.planning.schedule import mu_at
from chord_megatron.types import GradientComparison


class MuControl:
    """Asked once before each step and told once after it. The same on every rank."""

    def __init__(self, config: Config) -> None:
        self._config, self._history = config, StepHistory()

    def at(self, step: int) -> float:
        """mu of the step."""
        return mu_at(self._config, step, self._history)

    def measures_gradients(self, step: int) -> bool:
        """Whether the schedule asks for the norms of both streams at this step."""
        chord = self._config.chord
        return chord.mu_schedule == "gradient_ratio" and step % chord.mu_update_steps == 0

    def observe(self, step: int, reward: float | None, gradients: GradientComparison | None) -> None:
        """What the step measured; None: nothing. Norms of other steps than its own do not move a schedule."""
        norms = gradients[:2] if gradients is not None and self.measures_gradients(step) else None
        smoothing = self._config.chord.mu_smoothing
        self._history = self._history.observed(reward=reward, norms=norms, smoothing=smoothing)

    def state_dict(self) -> dict[str, Any]:
        """What the steps so far measured, as plain JSON values."""
        return self._history._asdict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises TypeError where the state is none."""
        history = StepHistory(**state)
        if not all(value is None or type(value) is float for value in history):
            raise TypeError("what mu follows is no number")
        self._history = history
