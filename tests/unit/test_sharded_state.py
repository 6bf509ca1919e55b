"""Weights of a checkpoint into modules that have more state than weights, as TransformerEngine's do."""

from __future__ import annotations

import pytest
import torch

from chord_megatron.backend import checkpoint
from chord_megatron.backend.sharded_state import set_weights


class LinearWithExtraState(torch.nn.Linear):
    """Of TransformerEngine's modules each has such an object, for FP8; a checkpoint of ours holds none."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(0)

    def set_extra_state(self, state: torch.Tensor) -> None:
        raise AssertionError("there is none")


def test_weights_are_set_without_the_extra_states():
    model = torch.nn.Sequential(LinearWithExtraState(2, 2), torch.nn.Linear(2, 1))
    weights = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    assert "0._extra_state" in model.state_dict()
    set_weights(model, weights)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("names", "wrong"), [(["weight"], "bias"), (["weight", "bias", "other"], "other")])
def test_a_missing_or_unknown_weight_is_an_error(names: list[str], wrong: str):
    tensors = {"weight": torch.ones(1, 1), "bias": torch.ones(1), "other": torch.ones(1)}
    with pytest.raises(AssertionError, match=rf"\['{wrong}'\]"):
        set_weights(LinearWithExtraState(1, 1), {name: tensors[name] for name in names})


def test_a_checkpoint_of_another_layout_in_the_same_process_has_its_own_groups(monkeypatch):
    """Megatron-Core writes the data-parallel group of the layout into the metadata that it is given."""

    class Part:
        found: list[bool] = []  # noqa: RUF012

        def sharded_state_dict(self, *arguments: object, metadata: dict[str, object], **more: object) -> dict[str, int]:
            self.found.append("dp_cp_group" in metadata)
            metadata["dp_cp_group"] = "of this layout"
            return {}

    monkeypatch.setattr(checkpoint, "unwrap", lambda chunk: chunk)
    for _ in range(2):
        checkpoint._sharded_state([Part()], Part(), is_loading=False)
    # Model and optimizer of one checkpoint share it; the next checkpoint begins anew.
    assert Part.found == [False, True, False, True]
