"""The fused vocabulary projection on one process, against log_softmax in float64: values, gradients, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import thread_group
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chord_megatron.ops import linear_log_probs, linear_log_probs_torch, token_blocks, vocab_parallel

FP64 = {"rtol": 0.0, "atol": 1e-12}


@dataclass(frozen=True)
class Inputs:
    """temperatures, upstream gradients g and g_H and valid: one per token."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    vocab_size: int
    temperatures: Tensor
    valid: Tensor
    upstream: tuple[Tensor, Tensor]

    def to(self, dtype: torch.dtype) -> Inputs:
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))


def make_inputs(
    tokens: int, hidden_size: int, rows: int, vocab_size: int | None = None, *, scale: float = 3.0
) -> Inputs:
    """float64; logits have a standard deviation of `scale`; padding rows of the weight are large."""
    generator = torch.Generator().manual_seed(11)
    vocab_size = vocab_size or rows
    hidden = torch.randn(tokens, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64) * scale / hidden_size**0.5
    weight[vocab_size:] = 1e3
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    temperatures = 0.5 + torch.rand(tokens, generator=generator)
    valid = torch.rand(tokens, generator=generator) < 0.7
    upstream = tuple(torch.randn(2, tokens, generator=generator, dtype=torch.float64))
    return Inputs(hidden, weight, targets, vocab_size, temperatures, valid, upstream)


def reference(
    x: Inputs, hidden: Tensor, weight: Tensor, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The plain path, with logits and log_softmax in `dtype`."""
    logits = hidden.to(dtype) @ weight[: x.vocab_size].to(dtype).t() / x.temperatures.to(dtype)[:, None]
    log_probs = torch.log_softmax(logits, dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(1)
    return log_probs.gather(1, x.targets[:, None]).squeeze(1) * x.valid, entropy * x.valid


def fused(x: Inputs, hidden: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    options = {"tile": (8, 96), "vocab_size": x.vocab_size, "temperature": x.temperatures, "valid": x.valid} | options
    return linear_log_probs(hidden, weight, x.targets, **options)


def results(
    function: Callable[..., tuple[Tensor, Tensor]], x: Inputs, which: str = "both", **options: Any
) -> list[Tensor]:
    """log_probs, entropy, and the gradients of hidden and weight through the outputs named by `which`."""
    hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
    outputs = function(x, hidden, weight, **options)
    chosen = {"both": (0, 1), "log_probs": (0,), "entropy": (1,)}[which]
    torch.autograd.backward([outputs[i] for i in chosen], [x.upstream[i].to(outputs[i].dtype) for i in chosen])
    return [*outputs, hidden.grad, weight.grad]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


# --- values and gradients -------------------------------------------------------------------------------------------


def test_two_columns_by_hand():
    # Logits log 3 and 0 at temperature 1/2: odds of 9 to 1.
    hidden = torch.tensor([[1.0]], dtype=torch.float64)
    weight = torch.tensor([[3.0], [1.0]], dtype=torch.float64).log()
    log_probs, entropy = linear_log_probs(hidden, weight, torch.tensor([1]), temperature=0.5)
    small, large = torch.tensor([0.1, 0.9], dtype=torch.float64).log().tolist()
    assert log_probs.item() == pytest.approx(small, abs=1e-15)
    assert entropy.item() == pytest.approx(-0.1 * small - 0.9 * large, abs=1e-15)


@pytest.mark.parametrize("which", ["log_probs", "entropy", "both"])
@pytest.mark.parametrize(("rows", "vocab_size"), [(320, 320), (384, 320), (18992, 18992), (151936, 151936)])
def test_float64_equals_log_softmax(rows: int, vocab_size: int, which: str):
    x = make_inputs(21, 16, rows, vocab_size)
    options = {} if rows < 1000 else {"tile": None}
    for ours, theirs in zip(results(fused, x, which, **options), results(reference, x, which), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, **FP64)


@pytest.mark.parametrize("which", ["log_probs", "entropy", "both"])
@pytest.mark.parametrize("offset", [0.0, 50.0, -50.0])
@pytest.mark.parametrize("rows", [320, 18992])
def test_float32_is_as_exact_as_log_softmax(rows: int, offset: float, which: str):
    """Root-mean-square errors against float64 on the same inputs; `offset` is added to all logits."""
    x = make_inputs(200, 64, rows)
    hidden = torch.cat([x.hidden, torch.ones(200, 1, dtype=torch.float64)], dim=1)
    weight = torch.cat([x.weight, torch.full((rows, 1), offset, dtype=torch.float64)], dim=1)
    x = replace(x, hidden=hidden, weight=weight, temperatures=torch.ones(200)).to(torch.float32)
    exact = results(reference, x.to(torch.float64), which)
    plain = results(lambda *inputs: reference(*inputs, dtype=torch.float32), x, which)
    for ours, theirs, true in zip(results(fused, x, which, tile=(64, 2048)), plain, exact, strict=True):
        assert ours.dtype == torch.float32
        error, plain_error = ((value - true).square().mean().sqrt().item() for value in (ours, theirs))
        assert error <= 1.1 * plain_error  # equal but for the random rounding of the logits


@pytest.mark.parametrize("offset", [50.0, -50.0])
def test_a_common_offset_changes_nothing(offset: float):
    """Numbers that float32 multiplies and adds exactly, whatever the offset: the results are bitwise equal."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randint(-16, 16, (9, 12), generator=generator) / 8
    weight = torch.randint(-16, 16, (40, 12), generator=generator) / 8
    hidden[:, 0] = 1.0
    shifted = weight.clone()
    shifted[:, 0] += offset
    x = replace(make_inputs(9, 12, 40), hidden=hidden, temperatures=torch.ones(9))
    plain, moved = (results(fused, replace(x, weight=w)) for w in (weight, shifted))
    assert_equal([*plain[:2], plain[3]], [*moved[:2], moved[3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_very_negative_logits(dtype: torch.dtype):
    """The running maximum starts at -inf and not at 0: e^(-5000) is 0 even in float64."""
    hidden = torch.ones(2, 1, dtype=dtype)
    weight = torch.tensor([[-5000.0], [-5001.0], [-5002.0]], dtype=dtype)
    log_probs, entropy = linear_log_probs(hidden, weight, torch.tensor([0, 2]), tile=(2, 1))
    expected = torch.log_softmax(weight[:, 0].double(), 0)
    torch.testing.assert_close(log_probs, expected[[0, 2]].to(dtype))
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum().to(dtype).expand(2))


@pytest.mark.parametrize("options", [{}, {"compute_entropy": False}, {"save_logits_bytes": 10**6}])
def test_gradcheck(options: dict[str, Any]):
    x = make_inputs(5, 4, 9, 7, scale=1.0)
    x.weight[7:] = 1.0  # small, so that a counted column would show in the finite difference
    x = replace(x, valid=torch.tensor([True, True, False, True, True]))
    leaves = x.hidden.requires_grad_(), x.weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: tuple(v for v in fused(x, h, w, tile=(2, 4), **options) if v is not None), leaves
    )


def test_a_vocabulary_of_one_token_is_certain():
    x = make_inputs(4, 8, 3, 1)
    log_probs, entropy, *gradients = results(fused, x)
    assert not log_probs.any() and not entropy.any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("save_logits_bytes", [0, 10**6])
def test_all_memory_is_on_the_device_of_the_inputs(save_logits_bytes: int):
    """Whatever the default device is: a tensor on "meta" has no numbers to compute with."""
    x = make_inputs(20, 8, 50, 47)
    options = {"save_logits_bytes": save_logits_bytes, "temperature": 0.7}
    hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
    with torch.device("meta"):
        outputs = fused(x, hidden, weight, **options)
        node = outputs[0].grad_fn  # asked without autograd, which would restore the default device
        gradients = node._forward_cls.backward(node, *x.upstream)[:2]
    assert_equal([*outputs, *gradients], results(fused, x, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_temperatures_dtype_does_not_matter(dtype: torch.dtype):
    x = make_inputs(4, 8, 50).to(torch.float32)
    temperatures = torch.tensor([0.5, 0.75, 1.0, 1.5])  # bfloat16 has all of them
    same, other = (results(fused, x, temperature=each) for each in (temperatures, temperatures.to(dtype)))
    assert all(value.dtype == torch.float32 for value in other)
    assert_equal(other, same)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_keep_the_sums_dtype(dtype: torch.dtype, add: bool, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, which multiplies bfloat16 into float32 where it is told to."""

    def addmm(summand: Tensor, left: Tensor, right: Tensor, *, beta: float, out: Tensor, **options: Any) -> None:
        assert options == ({} if left.dtype == out.dtype else {"out_dtype": out.dtype})
        out.copy_(left.to(out.dtype) @ right.to(out.dtype) + (beta * summand if beta else 0.0))

    monkeypatch.setattr(torch, "addmm", addmm)
    left, right = torch.tensor([[1.5, -2.0]], dtype=dtype), torch.tensor([[3.0], [0.25]], dtype=dtype)
    out = torch.tensor([[100.0 if add else torch.nan]])
    import_module("chord_megatron.ops.linear_log_probs")._multiply(out, left, right, add=add)
    assert out.item() == 4.0 + 100.0 * add


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_temperature_equals_one_per_row(temperature: float):
    x = make_inputs(13, 8, 50)
    x = replace(x, temperatures=torch.full((13,), temperature, dtype=torch.float64))
    for ours, theirs in zip(results(fused, x, temperature=temperature), results(fused, x), strict=True):
        torch.testing.assert_close(ours, theirs, **FP64)


def test_bfloat16_is_closer_than_logits_in_bfloat16():
    """Operands in bfloat16, everything else in float32: only the finished gradients are rounded."""
    x = replace(make_inputs(64, 64, 2000), temperatures=torch.ones(64)).to(torch.bfloat16)
    ours = results(fused, x)
    exact = results(reference, x.to(torch.float64))
    assert [value.dtype for value in ours] == [torch.float32] * 2 + [torch.bfloat16] * 2
    for value, true in zip(ours[:2], exact[:2], strict=True):
        torch.testing.assert_close(value, true.float(), rtol=1e-5, atol=1e-5)
    for value, true in zip(ours[2:], exact[2:], strict=True):
        torch.testing.assert_close(value, true.bfloat16(), rtol=2**-7, atol=1e-6)  # one unit in the last place


# --- rows that do not count -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [1e4, torch.inf, torch.nan])
def test_padding_rows_of_the_weight_are_excluded(garbage: float):
    x = make_inputs(10, 8, 60, 50)
    expected = results(fused, x)
    x.weight[50:] = garbage
    actual = results(fused, x)
    assert_equal(actual, expected)
    assert not actual[3][50:].any()


def test_ignored_rows_return_zero_and_may_hold_anything():
    x = make_inputs(30, 8, 50)
    expected = results(reference, x)
    x.hidden[~x.valid] = torch.nan
    x.targets[~x.valid] = -100
    x.temperatures[~x.valid] = 0.0
    actual = results(fused, x)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **FP64)
    for value in actual[:3]:
        assert not value[~x.valid].any()


@pytest.mark.parametrize("save_logits_bytes", [0, 10**6])
def test_rows_without_upstream_gradient_are_skipped(save_logits_bytes: int):
    """Exactly: even NaN in such a row does not reach the gradients of the others."""
    x = make_inputs(30, 8, 50)
    skipped = torch.arange(30) % 3 == 0
    for upstream in x.upstream:
        upstream[skipped] = 0.0
    # Of these rows one of both gradients is not 0: they count.
    x.upstream[0][1] = 0.0
    x.upstream[1][2] = 0.0
    expected = results(reference, x)
    x.hidden[skipped] = torch.nan
    actual = results(fused, x, save_logits_bytes=save_logits_bytes)
    for ours, theirs in zip(actual[2:], expected[2:], strict=True):
        torch.testing.assert_close(ours, theirs, **FP64)
    assert not actual[2][skipped].any()


@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_to_compute(tokens: int):
    x = make_inputs(tokens, 8, 50)
    x = replace(x, valid=torch.zeros(tokens, dtype=torch.bool), targets=torch.full((tokens,), -100))
    for value, shape in zip(results(fused, x), [(tokens,), (tokens,), (tokens, 8), (50, 8)], strict=True):
        assert torch.equal(value, torch.zeros(shape, dtype=torch.float64))


def test_no_upstream_gradient_at_all():
    x = make_inputs(6, 8, 50)
    for upstream in x.upstream:
        upstream.zero_()
    assert not any(gradient.any() for gradient in results(fused, x)[2:])


# --- how it is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [(1, 1), (7, 13), (1000, 1000), None])
def test_tiles_do_not_matter(tile: tuple[int, int] | None):
    x = make_inputs(20, 8, 50, 47)
    for ours, theirs in zip(results(fused, x, tile=tile), results(fused, x), strict=True):
        torch.testing.assert_close(ours, theirs, **FP64)


def test_saved_logits_give_the_same_bits():
    x = make_inputs(30, 8, 50, 47).to(torch.float32)
    assert_equal(results(fused, x, save_logits_bytes=10**6), results(fused, x))


def test_logits_are_saved_within_the_budget_only():
    x = replace(make_inputs(30, 8, 50, 47), valid=torch.ones(30, dtype=torch.bool))
    logits_bytes = 30 * 47 * 8
    for budget, expected in ((logits_bytes, 1), (logits_bytes - 1, 0), (0, 0)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            fused(x, x.hidden.requires_grad_(), x.weight, save_logits_bytes=budget)
        assert sum(t.shape == (30, 47) for t in saved) == expected


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, but for those in the memory of `given`."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.elements = 0
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self._given:
                self.elements = max(self.elements, value.numel())
        return out


def test_no_tensor_of_the_size_of_the_logits():
    x = make_inputs(512, 8, 1000)
    with LargestTensor() as largest:
        results(fused, x, tile=(64, 100))
    assert largest.elements == 2 * 64 * 100  # both halves of the tile's memory; dW has 8000 elements
    with LargestTensor() as largest:
        results(reference, x)
    assert largest.elements == 512 * 1000


@pytest.mark.parametrize("entropy", [False, True])
def test_the_torch_kernels_work_in_the_memory_of_the_tile(entropy: bool):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (tile, scratch), targets, ones = torch.zeros(2, 4, 50, dtype=torch.float64), torch.arange(4), torch.ones(4).double()
    statistics = torch.zeros(4, 4, dtype=torch.float64)
    statistics[0] = -torch.inf
    coefficients = (ones, ones if entropy else None, ones)
    with LargestTensor(tile, scratch) as largest:
        tile.copy_(logits)
        linear_log_probs_torch.add_statistics(tile, statistics, targets, ones, scratch, entropy=entropy)
        tile.copy_(logits)
        gradients = linear_log_probs_torch.logit_gradients(
            tile, statistics[0], coefficients, targets, ones, scratch, torch.float64
        )
    assert largest.elements == 4  # numbers of the rows
    shifted = logits - logits.amax(1, keepdim=True)
    expected = shifted.exp() * (1 - shifted if entropy else 1) + torch.eye(4, 50)
    torch.testing.assert_close(gradients, expected, **FP64)
    torch.testing.assert_close(statistics[1], shifted.exp().sum(1), **FP64)


def test_without_entropy():
    x = make_inputs(20, 8, 50)
    hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
    log_probs, entropy = fused(x, hidden, weight, compute_entropy=False)
    assert entropy is None
    log_probs.backward(x.upstream[0])
    expected = results(fused, x, "log_probs")
    assert_equal([log_probs, hidden.grad, weight.grad], [expected[0], *expected[2:]])


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_operand_frozen(frozen: str):
    x = make_inputs(20, 8, 50)
    leaves = {name: getattr(x, name).clone().requires_grad_(name != frozen) for name in ("hidden", "weight")}
    torch.autograd.backward(fused(x, **leaves), x.upstream)
    expected = dict(zip(("hidden", "weight"), results(fused, x)[2:]))
    for name, leaf in leaves.items():
        assert leaf.grad is None if name == frozen else torch.equal(leaf.grad, expected[name])


def test_backward_twice_gives_the_same():
    x = make_inputs(20, 8, 50)
    hidden = x.hidden.clone().requires_grad_()
    for budget in (0, 10**6):
        outputs = fused(x, hidden, x.weight, save_logits_bytes=budget)
        first, second = (torch.autograd.grad(outputs, hidden, x.upstream, retain_graph=True) for _ in range(2))
        assert_equal(list(first), list(second))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_triton_kernels_in_its_interpreter():
    """The interpreter must be chosen before triton is imported."""
    script = f"""
import sys, torch
from dataclasses import replace
sys.path[:0] = {sys.path!r}
from test_linear_log_probs import fused, make_inputs, results
x = make_inputs(9, 8, 50, 47)
x = replace(x, upstream=(x.upstream[0], torch.ones(1, dtype=torch.float64).expand(9)))
for which in ("log_probs", "entropy", "both"):
    for ours, theirs in zip(*(results(fused, x, which, implementation=i, tile=(5, 32)) for i in ("triton", "torch"))):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
"""
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)


@pytest.mark.parametrize(
    ("implementation", "device", "has_triton", "expected"),
    [
        (None, "cpu", True, "torch"),
        (None, "cuda", True, "triton"),
        (None, "cuda", False, "torch"),
        ("torch", "cuda", True, "torch"),
        ("triton", "cpu", True, "triton"),
    ],
)
def test_which_kernels(
    implementation: str | None, device: str, has_triton: bool, expected: str, monkeypatch: pytest.MonkeyPatch
):
    module = import_module("chord_megatron.ops.linear_log_probs")
    monkeypatch.setattr(module, "find_spec", lambda name: name if has_triton and name == "triton" else None)
    monkeypatch.setattr(module, "import_module", lambda name: name)
    kernels = module._kernels(implementation, torch.device(device))
    assert kernels == f"chord_megatron.ops.linear_log_probs_{expected}"


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(import_module("chord_megatron.ops.linear_log_probs"), "find_spec", lambda name: None)
    x = make_inputs(4, 8, 9)
    with pytest.raises(ValueError, match=r"^implementation 'triton' needs the package triton, which is not installed$"):
        fused(x, x.hidden, x.weight, implementation="triton")


# --- several ranks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("save_logits_bytes", [0, 10**6])
def test_shards_equal_the_whole(
    size: int, sequence_parallel: bool, save_logits_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    """Ranks that are threads: 48 rows of the weight, of which the last shard holds padding only or as well."""
    for module in (token_blocks, vocab_parallel):
        monkeypatch.setattr(module, "dist", thread_group)
    x = make_inputs(24, 8, 48, 22)
    group = thread_group.Group(size)

    def shard() -> list[Tensor]:
        rows = x.hidden.chunk(size)[group.rank()] if sequence_parallel else x.hidden
        hidden, weight = (t.clone().requires_grad_() for t in (rows, x.weight.chunk(size)[group.rank()]))
        outputs = fused(
            *(x, hidden, weight),
            tp_group=group,
            sequence_parallel=sequence_parallel,
            save_logits_bytes=save_logits_bytes,
            tile=(5, 7),
        )
        torch.autograd.backward(outputs, x.upstream)
        return [*(output.detach() for output in outputs), hidden.grad, weight.grad]

    *outputs, grad_hidden, grad_weight = results(reference, x)
    shards = group.run(shard)
    for rank, (log_probs, entropy, *gradients) in enumerate(shards):
        assert_equal([log_probs, entropy], shards[0][:2])
        expected = [*outputs, grad_hidden, grad_weight.chunk(size)[rank]]
        if sequence_parallel:
            expected[2] = grad_hidden.chunk(size)[rank]
        for ours, theirs in zip([log_probs, entropy, *gradients], expected, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), **FP64)


# --- Megatron-Core's main gradient ----------------------------------------------------------------------------------


def parameter(weight: Tensor, dtype: torch.dtype, **attributes: Any) -> torch.nn.Parameter:
    """A weight as DistributedDataParallel leaves it: with a main gradient, here of ones, and a flag."""
    weight = torch.nn.Parameter(weight.clone())
    weight.main_grad = torch.ones(weight.shape, dtype=dtype)
    for name, value in attributes.items():
        setattr(weight, name, value)
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_goes_into_the_main_gradient(dtype: torch.dtype):
    x = make_inputs(20, 8, 50).to(dtype)
    weight = parameter(x.weight, torch.float32, grad_added_to_main_grad=False)
    torch.autograd.backward(fused(x, x.hidden, weight), [g.float() for g in x.upstream])
    expected = results(reference, x.to(torch.float64))[3].float()
    torch.testing.assert_close(weight.main_grad - 1, expected, rtol=1e-5, atol=1e-5)
    assert weight.grad_added_to_main_grad
    assert weight.grad.shape == weight.shape and weight.grad.dtype == dtype  # Megatron-Core demands one, and drops it


def test_main_gradient_of_a_weight_used_twice():
    """With the embedding under zero_out_wgrad, .grad holds the embedding's part alone, for the hook to add."""
    x = make_inputs(20, 8, 50)
    weight = parameter(x.weight, torch.float64, grad_added_to_main_grad=False, zero_out_wgrad=True)
    embedded = weight[x.targets]
    torch.autograd.backward([*fused(x, x.hidden, weight), embedded], [*x.upstream, torch.ones_like(embedded)])
    torch.testing.assert_close(weight.main_grad - 1, results(reference, x)[3], **FP64)
    counts = torch.bincount(x.targets, minlength=50).double()
    assert torch.equal(weight.grad, counts[:, None].expand(50, 8))


def test_main_gradient_sums_two_calls_in_one_graph():
    x = make_inputs(20, 8, 50)
    weight = parameter(x.weight, torch.float64, grad_added_to_main_grad=False)
    torch.autograd.backward([*fused(x, x.hidden, weight), *fused(x, x.hidden, weight)], [*x.upstream, *x.upstream])
    torch.testing.assert_close(weight.main_grad - 1, 2 * results(reference, x)[3], **FP64)


@pytest.mark.parametrize(
    ("dtype", "attributes"), [(torch.float32, {}), (torch.bfloat16, {"grad_added_to_main_grad": False})]
)
def test_main_gradient_is_left_alone(dtype: torch.dtype, attributes: dict[str, Any]):
    """Where no hook would learn of it, or it could not hold float32 sums: the gradient is returned."""
    x = make_inputs(20, 8, 50).to(torch.float32)
    weight = parameter(x.weight, dtype, **attributes)
    torch.autograd.backward(fused(x, x.hidden, weight), [g.float() for g in x.upstream])
    assert torch.equal(weight.main_grad, torch.ones_like(weight.main_grad))
    assert not getattr(weight, "grad_added_to_main_grad", False)
    assert torch.equal(weight.grad, results(fused, x)[3])


# --- bad input ------------------------------------------------------------------------------------------------------

GOOD = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.tensor([0, 1, 4])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(3, 1, 4)}, r"hidden \[3, 1, 4\] and weight \[5, 4\]"),
        ({"hidden": torch.zeros(3, 6)}, r"hidden \[3, 6\] and weight \[5, 4\]"),
        ({"weight": torch.zeros(5, 4).double()}, r"hidden \(torch.float32\) and weight \(torch.float64\)"),
        ({"hidden": torch.zeros(3, 4).half(), "weight": torch.zeros(5, 4).half()}, "torch.float16"),
        ({"targets": torch.zeros(2).long()}, r"targets \[2\] .* each of 3 tokens"),
        ({"targets": torch.zeros(3)}, "targets is torch.float32"),
        ({"targets": torch.tensor([0, -1, 2])}, "targets from -1 to 2 .* vocabulary of 5"),
        ({"targets": torch.tensor([0, 4, 2]), "vocab_size": 4}, "targets from 0 to 4 .* vocabulary of 4"),
        ({"vocab_size": 6}, "vocab_size 6 .* 5 weight rows x 1 ranks"),
        ({"vocab_size": 0}, "vocab_size 0 .* 5 weight rows"),
        ({"valid": torch.ones(4, dtype=torch.bool)}, r"valid \[4\] .* each of 3 tokens"),
        ({"valid": torch.ones(3)}, "valid is torch.float32"),
        ({"temperature": torch.ones(2)}, r"temperature \[2\] .* each of 3 tokens"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, "temperature 0.0 must be above 0"),
        ({"temperature": -1.0}, "temperature -1.0 must be above 0"),
        ({"weight": torch.zeros(5, 4, device="meta")}, "different devices: hidden on cpu, weight on meta"),
        ({"implementation": "cuda"}, "implementation 'cuda'"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        linear_log_probs(**(GOOD | changes))
