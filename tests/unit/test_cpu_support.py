"""What the backend changes in this process where there is no CUDA: nothing as it is imported, and nothing twice."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
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


def test_the_library_of_a_logger_is_not_imported_where_there_is_no_gpu(tmp_path: Path):
    """Megatron-Core imports wandb wherever it can, for loggers that nothing here uses."""
    (tmp_path / "wandb.py").touch()  # importable even where it is not installed
    code = "import sys, chord_megatron.backend.engine; print('wandb' in sys.modules); import wandb"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("False\n", "")


_IMPORT_BESIDE_KERNELS = """
import chord_megatron.backend.engine
from megatron.core import optimizer
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import clip_grads, distrib_optimizer
print(optimizer.Adam.__module__, distrib_optimizer.HAVE_APEX_OR_TE, clip_grads.l2_norm_impl.__module__, HAVE_TE)
import transformer_engine
print(transformer_engine.__name__)
"""


def test_kernels_for_gpus_are_not_taken_where_there_is_none(tmp_path: Path):
    """Megatron-Core takes TransformerEngine's Adam and gradient norms wherever it can import them."""
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    kernels = ("applier", "l2norm", "scale", "scale_tensor")
    code = "class FusedAdam: pass\nFusedSGD = FusedAdam\n" + "".join(
        f"multi_tensor_{name} = print\n" for name in kernels
    )
    (package / "optimizers.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_BESIDE_KERNELS], capture_output=True, text=True, env=environment
    )
    expected = "torch.optim.adamw False megatron.core.utils False\ntransformer_engine\n"
    assert (done.stdout, done.stderr) == (expected, "")


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
