"""Vocab-parallel log-probs and entropy against torch's log_softmax in float64, values and gradients."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from chord_megatron.ops import vocab_parallel
from chord_megatron.ops.vocab_parallel import vocab_parallel_log_probs

FP64 = {"rtol": 0.0, "atol": 1e-12}


def reference(logits: Tensor, targets: Tensor, temperatures: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    log_probs = torch.log_softmax(logits[:, :vocab_size].double() / temperatures.double()[:, None], dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(1)
    return log_probs.gather(1, targets[:, None]).squeeze(1), entropy


def make_inputs(tokens: int, columns: int, vocab_size: int, *, scale: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """float64 logits with +1e4 in the padding columns, targets and a temperature per row."""
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    logits[:, vocab_size:] = 1e4
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    temperatures = 0.5 + torch.rand(tokens, generator=generator)
    return logits, targets, temperatures


def upstream(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(2, tokens, generator=generator, dtype=torch.float64))


def assert_matches_reference(logits: Tensor, targets: Tensor, temperatures: Tensor, vocab_size: int) -> None:
    """Values and gradients of float64 `logits`, at the tolerance of float64."""
    results = []
    for function in (vocab_parallel_log_probs, reference):
        leaf = logits.clone().requires_grad_()
        if function is reference:
            outputs = reference(leaf, targets, temperatures, vocab_size)
        else:
            outputs = vocab_parallel_log_probs(leaf, targets, temperatures, vocab_size=vocab_size)
        torch.autograd.backward(outputs, upstream(len(targets)))
        results.append((*outputs, leaf.grad))
    for actual, expected in zip(*results):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, **FP64)


# --- one process ----------------------------------------------------------------------------------------------------


def test_two_columns_by_hand():
    # p = 3/4, 1/4 at temperature 2: the logits are twice the log-odds.
    logits = torch.tensor([[2.0 * torch.tensor(3.0).double().log().item(), 0.0]], dtype=torch.float64)
    log_probs, entropy = vocab_parallel_log_probs(logits, torch.tensor([1]), torch.tensor([2.0]), vocab_size=2)
    quarter, three_quarters = torch.tensor([0.25, 0.75], dtype=torch.float64).log().tolist()
    assert log_probs.item() == pytest.approx(quarter, abs=1e-15)
    assert entropy.item() == pytest.approx(-0.25 * quarter - 0.75 * three_quarters, abs=1e-15)


def test_values_and_gradients_at_a_temperature_per_row():
    assert_matches_reference(*make_inputs(17, 40, 40), vocab_size=40)


def test_gradcheck():
    logits, targets, temperatures = make_inputs(6, 9, 9, scale=1.5)
    assert torch.autograd.gradcheck(
        lambda z: vocab_parallel_log_probs(z, targets, temperatures, vocab_size=9), logits.requires_grad_()
    )


def test_gradcheck_with_padding_columns():
    logits, targets, temperatures = make_inputs(4, 9, 7, scale=1.5)
    logits[:, 7:] = 3.0  # small, so that a counted column would show in the finite difference
    assert torch.autograd.gradcheck(
        lambda z: vocab_parallel_log_probs(z, targets, temperatures, vocab_size=7), logits.requires_grad_()
    )


@pytest.mark.parametrize("garbage", [1e4, torch.inf, torch.nan])
def test_padding_columns_are_excluded(garbage: float):
    logits, targets, temperatures = make_inputs(5, 12, 10)
    logits[:, 10:] = garbage
    assert_matches_reference(logits, targets, temperatures, vocab_size=10)
    leaf = logits.requires_grad_()
    log_probs, entropy = vocab_parallel_log_probs(leaf, targets, temperatures, vocab_size=10)
    (log_probs.sum() + entropy.sum()).backward()
    assert torch.equal(leaf.grad[:, 10:], torch.zeros(5, 2, dtype=torch.float64))


@pytest.mark.parametrize("offset", [50.0, -50.0, 1024.0])
def test_a_common_offset_changes_nothing(offset: float):
    """Logits in steps of 2^-8, so that float32 adds the offset exactly: the results are bitwise equal."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randint(-2048, 2048, (8, 30), generator=generator) / 256
    targets = torch.randint(0, 30, (8,), generator=generator)
    results = []
    for shift in (0.0, offset):
        leaf = (logits + shift).requires_grad_()
        outputs = vocab_parallel_log_probs(leaf, targets, torch.ones(8), vocab_size=30)
        torch.autograd.backward(outputs, [grad.float() for grad in upstream(8)])
        results.append((*outputs, leaf.grad))
    for plain, shifted in zip(*results):
        assert torch.equal(plain, shifted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_very_negative_logits(dtype: torch.dtype):
    """The running maximum starts at -inf and not at 0: e^(-10000) is 0 even in float64."""
    logits, targets, _ = make_inputs(6, 20, 20)
    logits = (logits - 1e4).to(dtype)
    expected = reference(logits, targets, torch.ones(6), 20)
    actual = vocab_parallel_log_probs(logits, targets, torch.ones(6), vocab_size=20)
    for value, wanted in zip(actual, expected):
        torch.testing.assert_close(value, wanted.to(dtype))
    if dtype == torch.float64:
        assert_matches_reference(logits, targets, torch.ones(6), vocab_size=20)


def test_a_near_certain_token_keeps_its_entropy():
    """One logit 30 above 7 others: entropy = 7 e^-30 * 31 to first order, and not 0."""
    logits = torch.zeros(1, 8, dtype=torch.float64)
    logits[0, 2] = 30.0
    log_probs, entropy = vocab_parallel_log_probs(logits, torch.tensor([2]), torch.ones(1), vocab_size=8)
    tail = 7 * torch.tensor(-30.0, dtype=torch.float64).exp().item()
    # log S loses digits next to 1: absolute error one unit of 1.0.
    assert log_probs.item() == pytest.approx(-tail, abs=2**-52)
    assert entropy.item() == pytest.approx(31 * tail, abs=2**-52)


def test_chunks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    logits, targets, temperatures = make_inputs(7, 12, 10)
    results = []
    for chunk in (1024, 3):
        monkeypatch.setattr(vocab_parallel, "_CHUNK_TOKENS", chunk)
        leaf = logits.clone().requires_grad_()
        outputs = vocab_parallel_log_probs(leaf, targets, temperatures, vocab_size=10)
        torch.autograd.backward(outputs, upstream(7))
        results.append((*outputs, leaf.grad))
    for whole, chunked in zip(*results):
        assert torch.equal(whole, chunked)


def test_bfloat16_logits_are_worked_on_in_float32():
    logits, targets, temperatures = make_inputs(9, 70, 64)
    half = logits.bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    results = []
    for leaf in (half, full):
        outputs = vocab_parallel_log_probs(leaf, targets, temperatures, vocab_size=64)
        torch.autograd.backward(outputs, [grad.float() for grad in upstream(9)])
        results.append(outputs)
    for value, upcast, exact in zip(*results, reference(full, targets, temperatures, 64)):
        assert value.dtype == torch.float32 and torch.equal(value, upcast)
        torch.testing.assert_close(value, exact.float())
    # The only rounding to bfloat16 is that of the finished gradient.
    assert half.grad.dtype == torch.bfloat16 and torch.equal(half.grad, full.grad.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_temperatures_dtype_does_not_matter(dtype: torch.dtype):
    logits, targets, _ = make_inputs(4, 30, 30)
    logits, temperatures = logits.bfloat16(), torch.tensor([0.5, 0.75, 1.0, 1.5])  # bfloat16 has all of them
    same, other = (
        vocab_parallel_log_probs(logits, targets, values, vocab_size=30)
        for values in (temperatures, temperatures.to(dtype))
    )
    for value, expected in zip(other, same):
        assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_only_one_output_used():
    """The upstream gradient of the unused output counts as zero."""
    logits, targets, temperatures = make_inputs(5, 11, 11)
    for index in (0, 1):
        results = []
        for outputs_of in (
            lambda z: vocab_parallel_log_probs(z, targets, temperatures, vocab_size=11),
            lambda z: reference(z, targets, temperatures, 11),
        ):
            leaf = logits.clone().requires_grad_()
            outputs_of(leaf)[index].sum().backward()
            results.append(leaf.grad)
        torch.testing.assert_close(*results, **FP64)


# --- several processes ----------------------------------------------------------------------------------------------

VOCAB_SIZE, PADDED, TOKENS = 320, 512, 12  # TP 4: shards of 128, the third half and the last all padding
TP_GROUPS = {4: [[0, 1, 2, 3]], 2: [[0, 2], [1, 3]]}  # TP 2 in strided groups: rank in the group, not in the world


def sharded_inputs() -> tuple[Tensor, Tensor, Tensor]:
    logits, targets, temperatures = make_inputs(TOKENS, PADDED, VOCAB_SIZE)
    targets[:6] = torch.tensor([0, 127, 128, 255, 256, 319])  # both ends of every shard with real columns
    logits[6] -= 1e3  # a row whose maximum is far below 0
    logits[7, 300] += 200.0  # a row that one shard has to itself
    return logits, targets, temperatures


def run_shards(rank: int, init_file: str, folder: str) -> None:
    """One rank: values and gradients of its shard for every TP size and dtype, saved for the test to compare."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{init_file}", rank=rank, world_size=4, timeout=timedelta(seconds=60)
    )
    logits, targets, temperatures = sharded_inputs()
    results = {}
    for tp_size, rank_lists in TP_GROUPS.items():
        groups = [dist.new_group(ranks) for ranks in rank_lists]  # every rank creates every group
        group = next(group for group, ranks in zip(groups, rank_lists) if rank in ranks)
        for dtype in (torch.float64, torch.float32):
            width = PADDED // tp_size
            shard = logits[:, group.rank() * width : (group.rank() + 1) * width].to(dtype).requires_grad_()
            outputs = vocab_parallel_log_probs(shard, targets, temperatures, vocab_size=VOCAB_SIZE, tp_group=group)
            torch.autograd.backward(outputs, [grad.to(dtype) for grad in upstream(TOKENS)])
            results[tp_size, dtype] = {
                "outputs": torch.stack(outputs).detach(),
                "gradient": shard.grad,
                "tp_rank": group.rank(),
            }
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What the four ranks saved: one launch for all tests below."""
    folder = tmp_path_factory.mktemp("ranks")
    forked.context()  # torch is imported once and not once a rank: half of the time of these tests
    mp.start_processes(run_shards, (str(folder / "init"), str(folder)), nprocs=4, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.distributed
@pytest.mark.parametrize("tp_size", [2, 4])
def test_shards_equal_one_process_in_values_and_gradients(ranks, tp_size: int):
    logits, targets, temperatures = sharded_inputs()
    leaf = logits.requires_grad_()
    outputs = reference(leaf, targets, temperatures, VOCAB_SIZE)
    torch.autograd.backward(outputs, upstream(TOKENS))
    width = PADDED // tp_size
    for result in (rank[tp_size, torch.float64] for rank in ranks):
        torch.testing.assert_close(result["outputs"], torch.stack(outputs).detach(), **FP64)
        start = result["tp_rank"] * width
        torch.testing.assert_close(result["gradient"], leaf.grad[:, start : start + width], **FP64)
        first_padding = max(0, VOCAB_SIZE - start)
        assert not result["gradient"][:, first_padding:].any()  # exactly 0 on padding


@pytest.mark.distributed
@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_bitwise_equal_on_all_ranks(ranks, tp_size: int, dtype: torch.dtype):
    for rank in ranks[1:]:
        assert torch.equal(rank[tp_size, dtype]["outputs"], ranks[0][tp_size, dtype]["outputs"])


@pytest.mark.distributed
@pytest.mark.parametrize("tp_size", [2, 4])
def test_float32_shards_are_as_exact_as_one_float32_process(ranks, tp_size: int):
    logits, targets, temperatures = sharded_inputs()
    exact = torch.stack(reference(logits.float(), targets, temperatures, VOCAB_SIZE)).float()
    torch.testing.assert_close(ranks[0][tp_size, torch.float32]["outputs"], exact)
