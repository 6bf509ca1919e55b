"""The expert rows of each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chord_megatron.algorithm.presets import SEMANTICS
from chord_megatron.batching.samples import expert_training_samples
from chord_megatron.config import Config
from chord_megatron.data.mixture import cursor_over
from chord_megatron.types import ExpertSample, TrainingSample


class ExpertStream:
    """Draws expert rows in a shuffled order, epoch after epoch."""

    def __init__(self, config: Config, experts: Sequence[ExpertSample], rows_per_step: int, seed: int) -> None:
        self._experts, self._rows_per_step = experts, rows_per_step
        semantics = SEMANTICS[config.chord.semantics]
        self._draws_at_0 = semantics.draws_experts_at_0 and bool(experts)
        self._temperature = config.rollout.temperature if semantics.experts_at_rollout_temperature else 1.0
        self._cursor = cursor_over(experts, seed)

    def next(self, mu: float) -> list[TrainingSample]:
        """The next rows; at mu = 0 none, and the cursor stays, unless chord.semantics draws them even so."""
        if mu == 0.0 and not self._draws_at_0:
            return []
        experts = [self._experts[i] for i in self._cursor.next(self._rows_per_step)]
        return expert_training_samples(experts, temperature=self._temperature)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises UserError when the data have another size or seed."""
        self._cursor.load_state_dict(state)
