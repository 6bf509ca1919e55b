"""The protocol between the training loop and whatever draws completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from chord_megatron.types import Prompt, RolloutSample, SamplingParams


class RolloutEngine(Protocol):
    """Draws completions from the policy. Every method is a collective call of all ranks."""

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, num_generations: int, step: int, policy_version: int
    ) -> list[RolloutSample]:
        """`num_generations` completions of each prompt, side by side, the same list on every rank.

        What is drawn depends on the weights, the prompts, `step` and the completion's place in the list,
        not on the parallel layout.
        """
        ...

    def update_weights(self, weights: Iterator[tuple[str, Tensor]], policy_version: int) -> None:
        """Take over the trainer's weights, given as (HF name, full tensor)."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...
