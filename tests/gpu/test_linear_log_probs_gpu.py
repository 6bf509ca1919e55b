"""The fused vocabulary projection with its Triton kernels on one NVIDIA GPU, against float64 and plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from chord_megatron.ops import linear_log_probs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
]


@dataclass(frozen=True)
class Inputs:
    """Per token: target, temperature, whether it counts, upstream gradients; some of these 0."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    temperatures: Tensor
    valid: Tensor
    upstream: tuple[Tensor, Tensor]
    vocab_size: int


def make_inputs(dtype: torch.dtype, *, tokens: int = 700, rows: int = 18992, vocab_size: int = 18900) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(3)
    options: dict[str, Any] = {"generator": generator, "device": "cuda"}
    hidden = torch.randn(tokens, 256, **options).to(dtype)
    weight = (torch.randn(rows, 256, **options) / 6).to(dtype)
    weight[vocab_size:] = torch.nan
    targets = torch.randint(0, vocab_size, (tokens,), **options)
    valid = torch.rand(tokens, **options) < 0.8
    upstream = torch.randn(2, tokens, **options) * (torch.rand(tokens, **options) < 0.8)
    temperatures = 0.5 + torch.rand(tokens, **options)
    return Inputs(hidden, weight, targets, temperatures, valid, tuple(upstream), vocab_size)


def reference(x: Inputs, hidden: Tensor, weight: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight[: x.vocab_size].t()
    log_probs = torch.log_softmax(logits.to(dtype) / x.temperatures.to(dtype)[:, None], dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(1)
    return log_probs.gather(1, x.targets[:, None]).squeeze(1) * x.valid, entropy * x.valid


def fused(x: Inputs, hidden: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    # 700 tokens and 18992 columns: several tiles with a rest both ways
    options = {"tile": (256, 4096), "vocab_size": x.vocab_size} | options
    return linear_log_probs(hidden, weight, x.targets, temperature=x.temperatures, valid=x.valid, **options)


def results(
    function: Callable[..., tuple[Tensor, Tensor]], x: Inputs, dtype: torch.dtype | None = None, **options: Any
) -> list[Tensor]:
    """log_probs, entropy and the gradients of hidden and weight."""
    leaves = [leaf.to(dtype or leaf.dtype).clone().requires_grad_() for leaf in (x.hidden, x.weight)]
    outputs = function(x, *leaves, **options)
    torch.autograd.backward(outputs, [gradient.to(outputs[0].dtype) for gradient in x.upstream])
    return [*outputs, *(leaf.grad for leaf in leaves)]


def rms_errors(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [(a.double() - e).square().mean().sqrt().item() for a, e in zip(actual, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_log_softmax(dtype: torch.dtype):
    """Its logits are float32, those of the plain path have the type of the weight."""
    x = make_inputs(dtype)
    exact = results(reference, x, torch.float64)
    plain = rms_errors(results(lambda *a: reference(*a, dtype=torch.float32), x), exact)
    ours = rms_errors(results(fused, x), exact)
    for error, plain_error in zip(ours, plain, strict=True):
        assert error <= 1.1 * plain_error


@pytest.mark.parametrize("compute_entropy", [True, False])
def test_triton_equals_torch_in_float64(compute_entropy: bool):
    x = make_inputs(torch.float64, tokens=300, rows=5000, vocab_size=4999)
    found = []
    for implementation in ("triton", "torch"):
        leaves = [leaf.clone().requires_grad_() for leaf in (x.hidden, x.weight)]
        outputs = fused(x, *leaves, implementation=implementation, compute_entropy=compute_entropy)
        present = [output for output in outputs if output is not None]
        torch.autograd.backward(present, [gradient.double() for gradient in x.upstream[: len(present)]])
        found.append([*present, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_kernels_on_the_gpu(dtype: torch.dtype):
    x = make_inputs(dtype)
    exact = results(reference, x, torch.float64)
    ours, theirs = (rms_errors(results(fused, x, implementation=name), exact) for name in ("triton", "torch"))
    assert ours == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize("save_logits_bytes", [0, 2**40])
def test_the_same_bits_every_time(save_logits_bytes: int):
    x = make_inputs(torch.bfloat16)
    for once, again in zip(results(fused, x), results(fused, x, save_logits_bytes=save_logits_bytes), strict=True):
        assert torch.equal(once, again)


def with_main_gradient(weight: Tensor) -> torch.nn.Parameter:
    """As DistributedDataParallel leaves it."""
    parameter = torch.nn.Parameter(weight)
    parameter.main_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    parameter.grad_added_to_main_grad = False
    return parameter


def test_bfloat16_weight_gradient_goes_into_the_main_gradient():
    x = make_inputs(torch.bfloat16)
    weight = with_main_gradient(x.weight)
    for _ in range(2):
        torch.autograd.backward(fused(x, x.hidden, weight), x.upstream)
    exact = results(reference, x, torch.float64)[3]
    # The logits' gradients are rounded to bfloat16, their products are not.
    assert (weight.main_grad / 2 - exact).norm() <= 2**-8 * exact.norm()


def test_extra_memory():
    """Qwen3-8B's head at 32768 tokens: at most 0.5 GiB beyond the gradients; its logits would take 20 GB."""
    tokens, hidden_size, vocab_size = 32768, 4096, 151936
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = with_main_gradient(torch.randn(vocab_size, hidden_size, device="cuda", dtype=torch.bfloat16) / 64)
    targets = torch.randint(0, vocab_size, (tokens,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    log_probs, entropy = linear_log_probs(hidden, weight, targets)
    (log_probs.sum() + entropy.sum()).backward()
    returned = hidden.grad.nbytes + weight.grad.nbytes  # the latter is Megatron-Core's dummy
    per_token = 64 * tokens  # a few numbers of 4 bytes
    assert torch.cuda.max_memory_allocated() - before - returned <= 2**29 + per_token
