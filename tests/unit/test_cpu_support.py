"""What the backend changes in this process where there is no CUDA: nothing as it is imported, and nothing twice."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
import torch

from chord_megatron.backend import checkpoint
from chord_megatron.backend.cpu import enable_cpu_support

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is changed where there is a GPU")

_IMPORT = """
import warnings, torch
before = torch.compile, torch.Tensor.cuda, list(warnings.filters)
import chord_megatron.backend.engine
assert (torch.compile, torch.Tensor.cuda, warnings.filters) == before
"""


def test_importing_the_backend_changes_nothing_and_says_nothing():
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "name",
    [
        "megatron.core.fusions.fused_bias_swiglu.swiglu",
        "megatron.core.fusions.fused_weighted_squared_relu.weighted_squared_relu",  # not imported by the backend
    ],
)
def test_functions_of_megatron_are_not_compiled(name: str):
    module, _, function = name.rpartition(".")
    assert not hasattr(getattr(import_module(module), function), "_torchdynamo_orig_callable")


def replaced_functions() -> dict[str, Any]:
    random = import_module("megatron.core.tensor_parallel.random")
    clip_grads = import_module("megatron.core.optimizer.clip_grads")
    dispatcher = import_module("megatron.core.transformer.moe.token_dispatcher").MoEAlltoAllTokenDispatcher
    return {
        "current_device": torch.cuda.current_device,
        "get_rng_state": torch.cuda.get_rng_state,
        "Tensor.cuda": torch.Tensor.cuda,
        "random": random._get_cuda_rng_state,
        "constants": clip_grads.clip_grad_by_total_norm_fp32.__code__,
        "splits": dispatcher._maybe_dtoh_and_synchronize,
    }


def test_a_second_call_replaces_nothing_again():
    enable_cpu_support()
    once = replaced_functions()
    enable_cpu_support()
    assert replaced_functions() == once


def test_states_that_a_checkpoint_lacks_are_kept_while_it_loads_and_nothing_stays_replaced():
    kind = import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    inner, weight = kind.__new__(kind), torch.nn.Parameter(torch.zeros(2))
    inner.config = type("Config", (), {"use_precision_aware_optimizer_no_fp8_or_ds_fp8": False})
    inner.model_param_group_index_map = {weight: (0, 0)}
    state = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}
    inner.optimizer = type("Adam", (), {"param_groups": [{"params": [weight]}], "state": {weight: state}})
    optimizer = type("Chained", (), {"chained_optimizers": [inner]})
    before = dict(vars(inner))
    for value in (1.0, 2.0):
        with torch.no_grad(), checkpoint.absent_states_kept(optimizer):
            loaded = {"param": torch.full((2,), value), "exp_avg": torch.full((2,), -value)}
            inner._set_main_param_and_optimizer_states(weight, loaded)
        assert vars(inner) == before
        assert (weight.tolist(), state["exp_avg"].tolist(), state["step"].item()) == ([value] * 2, [-value] * 2, 3.0)
