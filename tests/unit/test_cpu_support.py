"""What the backend changes in torch where there is no CUDA."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import chord_megatron.backend  # noqa: F401 - what it changes is tested


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is changed where there is a GPU")
def test_functions_of_megatron_are_not_compiled_but_all_others_are():
    swiglu = import_module("megatron.core.fusions.fused_bias_swiglu").swiglu
    assert not hasattr(swiglu, "_torchdynamo_orig_callable")
    x = torch.tensor([1.0, -2.0, 3.0, 4.0])
    torch.testing.assert_close(swiglu(x), torch.nn.functional.silu(x[:2]) * x[2:])

    compiled = [torch.compile(double, backend="eager"), torch.compile(backend="eager")(double)]
    for function in compiled:
        assert function._torchdynamo_orig_callable is double
        assert function(torch.ones(2)).tolist() == [2.0, 2.0]
