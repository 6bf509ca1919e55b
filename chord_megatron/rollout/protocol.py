"""The protocol between the training loop and whatever draws completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from chord_megatron.types import RolloutRequest, RolloutSample

# A pass over the trainer's weights: (Hugging Face name, full tensor). Each of its steps is a collective call.
WeightSource = Callable[[], Iterator[tuple[str, Tensor]]]


class RolloutEngine(Protocol):
    """Draws completions from the policy. Every method is a collective call of all ranks."""

    weights_version: int | None  # policy version of the weights that it would sample with; None: it has none to trust
    # Of the last batch, from its first request to its last answer; None where the trainer waits all the while.
    generation_seconds: float | None

    def generate(self, request: RolloutRequest) -> list[RolloutSample]:
        """The completions of the request, the same list on every rank."""
        ...

    def update_weights(self, weights: WeightSource, policy_version: int) -> None:
        """Take over the trainer's weights."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...


@runtime_checkable
class ScoringEngine(RolloutEngine, Protocol):
    """An engine with weights of its own, which can be compared with the trainer's."""

    def score(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        """Log-probs of each sequence's tokens but its first, at temperature 1, by the name of who computed them.

        Ranks may return different engines' scores; a rank without one returns nothing.
        """
        ...


@runtime_checkable
class AsynchronousEngine(RolloutEngine, Protocol):
    """An engine that draws while the trainer trains."""

    def submit(self, request: RolloutRequest) -> Callable[[], list[RolloutSample]]:
        """Begin what `generate` does; the result waits for it. Weights must not be updated before."""
        ...
