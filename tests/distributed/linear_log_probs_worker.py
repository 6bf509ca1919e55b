"""Four ranks as TP 4 and as two strided groups of TP 2: the sharded projection against the whole one on each rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from chord_megatron.backend.groups import initialize_distributed, shut_down_distributed
from chord_megatron.config import ParallelConfig
from chord_megatron.ops import linear_log_probs

TP_GROUPS = {4: [[0, 1, 2, 3]], 2: [[0, 2], [1, 3]]}
# real and padded vocabulary: at TP 4, 512 leaves one shard all padding and one half
SIZES = {"V 320": (320, 512), "V 18992": (18992, 18992), "V 151936": (151936, 151936), "V 1001": (1001, 1024)}


Results = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One batch; `tile` None for the large ones. Rows: [T]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    vocab_size: int
    temperatures: Tensor
    valid: Tensor
    upstream: tuple[Tensor, Tensor]
    tile: tuple[int, int] | None
    save_logits_bytes: int = 0


def make_case(vocab_size: int, padded: int, tokens: int) -> Case:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, 8, generator=generator, dtype=torch.float64)
    weight[vocab_size:] = torch.nan
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    targets[:4] = torch.tensor([0, vocab_size - 1, vocab_size // 2, vocab_size // 4])[:tokens]
    temperatures = 0.5 + torch.rand(tokens, generator=generator)
    upstream = tuple(torch.randn(2, tokens, generator=generator, dtype=torch.float64))
    tile = (8, 48) if padded < 2000 else None
    return Case(hidden, weight, targets, vocab_size, temperatures, torch.ones(tokens).bool(), upstream, tile)


def make_cases() -> dict[str, Case]:
    cases = {name: make_case(*size, tokens=36 if size[0] < 2000 else 12) for name, size in SIZES.items()}
    plain = cases["V 320"]
    some = torch.arange(36) % 3 != 1
    some[9:20] = False  # at TP 4, the second rank has no row that counts
    no_gradient = tuple(gradient * (torch.arange(36) >= 18) for gradient in plain.upstream)
    cases["ignored rows"] = replace(plain, valid=some, targets=plain.targets.where(some, torch.tensor(-100)))
    cases["all ignored"] = replace(plain, valid=torch.zeros(36).bool())
    cases["rows without gradient"] = replace(plain, valid=some, upstream=no_gradient)
    cases["no gradient"] = replace(plain, upstream=tuple(g * 0 for g in plain.upstream))
    cases["saved logits"] = replace(plain, valid=some, save_logits_bytes=10**6)
    cases["one large tile"] = replace(plain, tile=(1024, 2048))
    cases["no tokens"] = make_case(320, 512, tokens=0)
    return cases


def run(case: Case, group: dist.ProcessGroup | None, sequence_parallel: bool, dtype: torch.dtype) -> Results:
    """log_probs, entropy and the gradients of this rank's rows of hidden and of the weight."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    hidden = case.hidden.chunk(size)[rank] if sequence_parallel and len(case.hidden) else case.hidden
    hidden, weight = (x.to(dtype).clone().requires_grad_() for x in (hidden, case.weight.chunk(size)[rank]))
    outputs = linear_log_probs(
        hidden,
        weight,
        case.targets,
        tp_group=group,
        vocab_size=case.vocab_size,
        temperature=case.temperatures,
        valid=case.valid,
        sequence_parallel=sequence_parallel,
        save_logits_bytes=case.save_logits_bytes,
        tile=case.tile,
    )
    torch.autograd.backward(outputs, [gradient.to(outputs[0].dtype) for gradient in case.upstream])
    return (*(output.detach() for output in outputs), hidden.grad, weight.grad)


def compare(case: Case, whole: Results, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    """AssertionError where a shard differs from the whole, or a rank from the others."""
    rank, size = group.rank(), group.size()
    expected_hidden = whole[2].chunk(size)[rank] if sequence_parallel and len(case.hidden) else whole[2]
    expected = (*whole[:2], expected_hidden, whole[3].chunk(size)[rank])
    for actual, wanted in zip(run(case, group, sequence_parallel, torch.float64), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0.0, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16) if case.tile else ():
        outputs = torch.stack(run(case, group, sequence_parallel, dtype)[:2])
        gathered = [torch.empty_like(outputs) for _ in range(size)]
        dist.all_gather(gathered, outputs, group=group)
        assert all(torch.equal(outputs, other) for other in gathered), f"{dtype} differs between ranks"


# --- under Megatron-Core's DistributedDataParallel ------------------------------------------------------------------


class Head(torch.nn.Module):
    """Embedding and projection; tied, or each with its own weight."""

    def __init__(self, tied: bool, group: dist.ProcessGroup, fused: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(group.rank())
        self.embedding, self.output = (
            torch.nn.Parameter(torch.randn(64, 8, generator=generator, dtype=torch.bfloat16)) for _ in range(2)
        )
        if tied:
            self.output = self.embedding
            self.embedding.zero_out_wgrad = True  # LanguageModule.setup_embeddings_and_output_layer
        self.group, self.fused = group, fused

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embedding[tokens % 64]
        if not self.fused:  # the gradients of a copy come back through autograd, and the hook adds them
            return linear_log_probs(hidden, self.output * 1.0, tokens, tp_group=self.group)
        return linear_log_probs(hidden, self.output, tokens, tp_group=self.group)


def main_gradients(tied: bool, overlap: bool, group: dist.ProcessGroup, fused: bool) -> list[Tensor]:
    """After two micro-batches."""
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    model = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1), config, Head(tied, group, fused)
    )
    model.zero_grad_buffer()
    for seed in range(2):
        tokens = torch.randint(0, 128, (10,), generator=torch.Generator().manual_seed(seed))
        with model.no_sync() if seed == 0 else torch.enable_grad():
            torch.stack(model(tokens)).sum().backward()
    model.finish_grad_sync()
    return [parameter.main_grad.clone() for parameter in model.parameters()]


def compare_main_gradients(tied: bool, overlap: bool, group: dist.ProcessGroup) -> None:
    actual, expected = (main_gradients(tied, overlap, group, fused) for fused in (True, False))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=1e-2)  # theirs is rounded to bfloat16
        assert ours.dtype == torch.float32 and ours.abs().sum() > 1


def finding(check: Callable[[], None]) -> str:
    """What is wrong on any rank; empty if nothing is."""
    try:
        check()
        mine = ""
    except AssertionError as error:
        mine = f"rank {dist.get_rank()}: {error}"
    everyone = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return "\n".join(text for text in everyone if text)


def main(results: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    findings = {}
    cases = {name: (case, run(case, None, False, torch.float64)) for name, case in make_cases().items()}
    for tp_size, rank_lists in TP_GROUPS.items():
        groups = [dist.new_group(ranks) for ranks in rank_lists]  # every rank creates every group
        group = next(group for group, ranks in zip(groups, rank_lists) if dist.get_rank() in ranks)
        for name, (case, whole) in cases.items():
            for sp in (False, True):
                key = f"TP {tp_size}{' + SP' * sp}: {name}"
                findings[key] = finding(partial(compare, case, whole, group, sp))
    group = initialize_distributed(ParallelConfig(tensor_model_parallel_size=2), seed=0).tp_group
    for tied in (False, True):
        for overlap in (False, True):
            name = f"DDP: {'tied' if tied else 'untied'}{' with overlap' * overlap}"
            findings[name] = finding(partial(compare_main_gradients, tied, overlap, group))
    if dist.get_rank() == 0:
        results.write_text(json.dumps(findings), encoding="utf-8")
    shut_down_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
