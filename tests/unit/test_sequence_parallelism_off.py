"""Decoding switches sequence parallelism off in the models that it gets, and leaves them as they were."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from chord_megatron.backend.generation import _sequence_parallelism_off


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(sequence_parallel=True)
        self.embedding, self.dense, self.expert = (torch.nn.Module() for _ in range(3))
        self.embedding.reduce_scatter_embeddings = self.embedding.scatter_to_sequence_parallel = True
        self.dense.sequence_parallel, self.expert.sequence_parallel = True, False

    def switches(self) -> list[bool]:
        embedding = [self.embedding.reduce_scatter_embeddings, self.embedding.scatter_to_sequence_parallel]
        return [self.config.sequence_parallel, *embedding, self.dense.sequence_parallel, self.expert.sequence_parallel]


def test_it_is_off_within_and_as_before_behind():
    models = [Model(), Model()]
    with pytest.raises(KeyboardInterrupt), _sequence_parallelism_off(models):
        assert [model.switches() for model in models] == [[False] * 5] * 2
        raise KeyboardInterrupt
    assert [model.switches() for model in models] == [[True, True, True, True, False]] * 2


def test_a_model_in_the_place_of_an_earlier_one_is_switched_off_too():
    """Megatron-Core remembers modules by the id of their model."""
    earlier = Model()
    address = id(earlier)
    with _sequence_parallelism_off([earlier]):
        pass
    del earlier
    models: list[Model] = []
    while not any(id(model) == address for model in models) and len(models) < 1000:
        models.append(Model())
    with _sequence_parallelism_off(models):
        assert {switch for model in models for switch in model.switches()} == {False}
