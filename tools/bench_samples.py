"""Host time and bytes of bringing a step's completions, and their log-probs, to every rank.

Side by side: samples of Python tuples that travel as pickles, as this project had them at first, and samples
of tensors that travel as tensors. `python tools/bench_samples.py [--completions 1024 --tokens 4096 --ranks 2]` writes
benchmarks/results/samples.json.
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_environment import hardware, versions
from torch import Tensor

from chord_megatron.batching.samples import rollout_training_samples
from chord_megatron.rollout.samples import Completion, make_sample, share_samples
from chord_megatron.types import Prompt, RolloutRequest, SamplingParams

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "samples.json"
PROMPT_TOKENS, VOCAB_SIZE, NUM_GENERATIONS = 256, 151_936, 8


@dataclass(frozen=True)
class TupleSample:
    """A completion as it was: three tuples of Python numbers."""

    sample_index: int
    tokens: tuple[int, ...]
    response_mask: tuple[bool, ...]
    rollout_log_probs: tuple[float, ...]


def share_tuples(request: RolloutRequest, mine: list[Completion]) -> tuple[list[Any], int]:
    """The samples as tuples and pickles; the bytes that this rank sends."""
    repeated = request.repeated
    samples = []
    for place, tokens, log_probs in mine:
        prompt = repeated[place].tokens
        mask = (False,) * len(prompt) + (True,) * len(tokens)
        padded = (0.0,) * len(prompt) + tuple(log_probs.tolist())
        samples.append(TupleSample(place, (*prompt, *tokens.tolist()), mask, padded))
    shares: list[list[TupleSample]] = [[]] * dist.get_world_size()
    dist.all_gather_object(shares, samples)
    everything = sorted((s for share in shares for s in share), key=lambda s: s.sample_index)
    rows = [
        (torch.tensor(s.tokens), torch.tensor(s.response_mask), torch.tensor(s.rollout_log_probs)) for s in everything
    ]
    return rows, len(pickle.dumps(samples))


def share_tensors(request: RolloutRequest, mine: list[Completion]) -> tuple[list[Any], int]:
    """The same as the trainer does it now."""
    samples = share_samples(request, mine, None, torch.device("cpu"))
    rows = rollout_training_samples(samples, torch.zeros(len(samples)), temperature=1.0, overlong_filter=False)
    # Of the tensors that are summed, over all ranks: as many bytes as a ring sends per rank at 2 ranks.
    sent = sum(8 * int(s.response_mask.sum()) + 16 for s in samples)
    return [(row.tokens, row.loss_mask, row.rollout_log_probs) for row in rows], sent


def gather_pickled_rows(rows: dict[int, Tensor], lengths: list[int]) -> tuple[list[Tensor], int]:
    """Log-probs of each rank's samples as a pickled dict."""
    everywhere: list[dict[int, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, rows)
    merged = {index: row for share in everywhere for index, row in share.items()}
    return [merged[index] for index in range(len(lengths))], len(pickle.dumps(rows))


def gather_flat_rows(rows: dict[int, Tensor], lengths: list[int]) -> tuple[list[Tensor], int]:
    """The same as one tensor that is summed."""
    flat = torch.zeros(sum(lengths))
    places = flat.split(lengths)
    for index, row in rows.items():
        places[index].copy_(row)
    dist.all_reduce(flat)
    return list(flat.split(lengths)), flat.nbytes


def bytes_held(request: RolloutRequest, drawn: Completion) -> dict[str, int]:
    """What one completion's sample takes in memory in both forms."""
    prompt = request.repeated[drawn.place].tokens
    tokens, log_probs = (*prompt, *drawn.tokens.tolist()), (0.0,) * len(prompt) + tuple(drawn.log_probs.tolist())
    numbers = [n for n in tokens if n > 256] + list(log_probs[len(prompt) :])  # the others are shared objects
    tuples = sum(map(sys.getsizeof, (tokens, log_probs, (False,) * len(tokens), *numbers)))
    sample = make_sample(request.repeated[drawn.place], drawn, request)
    tensors = sample.tokens.nbytes + sample.response_mask.nbytes + sample.rollout_log_probs.nbytes
    return {"tuples": tuples, "tensors": tensors}


def measure(function: Callable[[], tuple[Any, int]], repeats: int) -> tuple[dict[str, float], Any]:
    """Medians of wall and CPU seconds on the slower rank, and the bytes that a rank sends."""
    wall, cpu = [], []
    for _ in range(repeats):
        dist.barrier()
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        result, sent = function()
        after = resource.getrusage(resource.RUSAGE_SELF)
        seconds = torch.tensor(
            [time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime]
        )
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        wall.append(seconds[0].item())
        cpu.append(seconds[1].item())
    return {"wall_seconds": statistics.median(wall), "cpu_seconds": statistics.median(cpu), "bytes_sent": sent}, result


def work(rank: int, arguments: argparse.Namespace, store: str) -> None:
    """One rank: both ways of both parts, compared with one another."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=arguments.ranks)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(i, "", tuple(torch.randint(VOCAB_SIZE, (PROMPT_TOKENS,), generator=generator).tolist()), "")
        for i in range(arguments.completions // NUM_GENERATIONS)
    ]
    request = RolloutRequest(prompts, SamplingParams(), NUM_GENERATIONS, 0, 0)
    mine = [
        Completion(
            place,
            torch.randint(VOCAB_SIZE, (arguments.tokens,), dtype=torch.int32, generator=generator),
            -torch.rand(arguments.tokens, generator=generator),
        )
        for place in range(rank, arguments.completions, arguments.ranks)
    ]
    lengths = [PROMPT_TOKENS + arguments.tokens] * arguments.completions
    rows = {i: torch.rand(lengths[i], generator=generator) for i in range(rank, len(lengths), arguments.ranks)}
    results = {}
    for part, before, after in (
        ("completions", lambda: share_tuples(request, mine), lambda: share_tensors(request, mine)),
        ("log_probs", lambda: gather_pickled_rows(rows, lengths), lambda: gather_flat_rows(rows, lengths)),
    ):
        (was, old), (now, new) = measure(before, arguments.repeats), measure(after, arguments.repeats)
        assert all(
            torch.equal(torch.as_tensor(a).to(b.dtype), b)
            for x, y in zip(old, new, strict=True)
            for a, b in zip(x if isinstance(x, tuple) else (x,), y if isinstance(y, tuple) else (y,))
        )
        results[part] = {"pickles": was, "tensors": now, "ratio": {key: was[key] / now[key] for key in was}}
    if rank == 0:
        results["bytes_held_by_a_sample"] = bytes_held(request, mine[0])
        settings = dict(vars(arguments))
        text = json.dumps(
            {"hardware": hardware(), "versions": versions(["torch"]), "settings": settings, **results}, indent=2
        )
        RESULT.write_text(text + "\n", encoding="utf-8")
        print(text)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--completions", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    store = Path(RESULT.parent, ".store")
    store.unlink(missing_ok=True)
    try:
        mp.spawn(work, (arguments, str(store)), nprocs=arguments.ranks)
    finally:
        store.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
