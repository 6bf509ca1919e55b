"""Steps of a saved optimizer, in the form of the Adam that goes on: torch's counts by parameter, the fused by group.

How TransformerEngine's own takes them is checked by tools/check_transformer_engine.py.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from chord_megatron.backend.checkpoint import _translate_steps

MOMENT = torch.ones(2)


def of_torch(count: int) -> dict[str, Any]:
    """What FP32Optimizer saves: a step of zero is left out."""
    steps = {"common_step": torch.tensor(float(count))} if count else {}
    return {"state": {0: {"exp_avg": MOMENT}, **steps}, "param_groups": [{"lr": 1.0, "params": [0]}, {"lr": 1.0}]}


def of_fused(count: int) -> dict[str, Any]:
    """The step of a group that is empty on this rank may lag behind; before the first one there is none."""
    full, empty = ({"step": count}, {"step": count - 1}) if count else ({}, {})
    return {"state": {0: {"exp_avg": MOMENT}}, "param_groups": [{"params": [0], **full}, {"params": [], **empty}]}


def steps(state: dict[str, Any]) -> tuple[Any, list[Any]]:
    """(common step, steps of the groups), None where there is none."""
    return state.get("state", {}).get("common_step"), [group.get("step") for group in state["param_groups"]]


@pytest.mark.parametrize("saved", [of_torch, of_fused])
@pytest.mark.parametrize("count", [0, 7])
def test_the_count_goes_on(saved: Any, count: int):
    by_parameter, by_group = saved(count), saved(count)
    _translate_steps(by_parameter, by_parameter=True)
    assert steps(by_parameter) == (torch.tensor(float(count)), [None, None])
    _translate_steps(by_group, by_parameter=False)
    assert steps(by_group) == (None, [count, count])
    assert by_group["state"] == {0: {"exp_avg": MOMENT}}  # TransformerEngine's Adam takes no other names


def test_it_is_found_in_mixed_precision_and_in_every_optimizer_of_a_chain():
    state = {index: {"optimizer": of_torch(7), "fp32_from_fp16_params": [[MOMENT]]} for index in range(2)}
    _translate_steps(state, by_parameter=False)
    assert [steps(inner["optimizer"]) for inner in state.values()] == [(None, [7, 7])] * 2


@pytest.mark.parametrize("by_parameter", [True, False])
def test_one_that_had_no_parameters_where_it_was_saved_has_stepped_with_its_chain(by_parameter: bool):
    """As that of the experts, saved by a first stage without any."""
    distributed = [{"optimizer": {"param_groups": [group]}} for group in ({"step": 7}, {})]
    state: dict[int, Any] = dict(enumerate([*distributed, of_torch(0)]))
    _translate_steps(state, by_parameter=by_parameter)
    assert [steps(state[index]["optimizer"]) for index in range(2)] == [(None, [7])] * 2
    assert steps(state[2]) == ((torch.tensor(7.0), [None, None]) if by_parameter else (None, [7, 7]))


@pytest.mark.parametrize("count", [0, 7])
@pytest.mark.parametrize("by_parameter", [True, False])
def test_the_distributed_optimizer_has_them_in_its_groups_for_either(count: int, by_parameter: bool):
    groups = [{"lr": 1.0, **({"step": count} if count else {})} for _ in range(2)]
    state = {"optimizer": {"param_groups": deepcopy(groups)}, "param_state": {"buffer": MOMENT}}
    _translate_steps(state, by_parameter=by_parameter)
    assert steps(state["optimizer"]) == (None, [count, count])
    assert state["param_state"] == {"buffer": MOMENT}
