"""The expert rows of each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chord_megatron.batching.samples import expert_training_samples
from chord_megatron.data.cursor import ShuffledCursor
from chord_megatron.types import ExpertSample, TrainingSample


class ExpertStream:
    """Draws expert rows in a shuffled order, epoch after epoch."""

    def __init__(self, experts: Sequence[ExpertSample], rows_per_step: int, seed: int) -> None:
        self._experts, self._rows_per_step = experts, rows_per_step
        self._cursor = ShuffledCursor(max(1, len(experts)), seed)

    def next(self, mu: float) -> list[TrainingSample]:
        """The next rows; none, and the cursor stays, at mu = 0."""
        if mu == 0.0:
            return []
        return expert_training_samples([self._experts[i] for i in self._cursor.next(self._rows_per_step)])

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises UserError when the data have another size or seed."""
        self._cursor.load_state_dict(state)
