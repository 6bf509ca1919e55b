"""Seconds of a training pass over rows as they come, side by side with what makes it shorter; one run, ratios.

- long tail: lengths are log-normal (sigma 1); two data-parallel ranks. Rows by themselves, padded to the longest,
  packed by number, spread by cost under a budget of tokens (train.max_tokens_per_micro_batch).
- idle rows: a share of the completions has no advantage; run and not run (train.skip_idle_rows).
- shared prompts: groups of eight at prompt : completion 4:1, 1:1, 1:4; each row by itself and train.share_prompts.

The gradient norms of both sides are compared before anything is timed. Repeats alternate; medians are reported of the
slower rank's wall seconds and of the sum of the ranks' CPU seconds. `python tools/bench_step.py` writes
benchmarks/results/step.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_environment import hardware, versions
from transformers import Qwen3Config, Qwen3ForCausalLM

from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.algorithm.policy_losses import clipped_policy_loss
from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import initialize_distributed, shut_down_distributed
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.types import GlobalBatch, TrainingSample

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "step.json"
VOCAB_SIZE, LONGEST, MEDIAN, GROUP, ROW_TOKENS = 4096, 2048, 160, 8, 320
LOSS = partial(chord_loss, objective=Objective(partial(clipped_policy_loss, epsilon=0.2, epsilon_high=0.2)), mu=0.0)
Pass = Callable[[], GlobalBatch]


def row(prompt: torch.Tensor, length: int, advantage: float, generator: torch.Generator) -> TrainingSample:
    """A rollout whose completion has `length` tokens."""
    tokens = torch.cat([prompt, torch.randint(VOCAB_SIZE, (length,), generator=generator)])
    return TrainingSample(
        tokens, torch.arange(len(tokens)) >= len(prompt), is_expert=False, temperature=1.0, advantage=advantage
    )


def long_tailed(rows: int, generator: torch.Generator) -> list[TrainingSample]:
    """Prompts of 16 tokens and log-normal completions."""
    lengths = (MEDIAN * torch.randn(rows, generator=generator).exp()).round().long().clamp(8, LONGEST - 16)
    prompts = torch.randint(VOCAB_SIZE, (rows, 16), generator=generator)
    return [row(prompt, int(n), 1.0 - i % 2 * 2, generator) for i, (prompt, n) in enumerate(zip(prompts, lengths))]


def groups(prompt_tokens: int, completion_tokens: int, generator: torch.Generator) -> list[TrainingSample]:
    """Four groups of one prompt each; completions of a half to one and a half of the mean length."""
    samples = []
    for _ in range(4):
        prompt = torch.randint(VOCAB_SIZE, (prompt_tokens,), generator=generator)
        lengths = torch.randint(completion_tokens // 2, completion_tokens * 3 // 2, (GROUP,), generator=generator)
        samples += [row(prompt, int(n), 1.0 - i % 2 * 2, generator) for i, n in enumerate(lengths)]
    return samples


def padded(sample: TrainingSample, length: int) -> TrainingSample:
    """With tokens behind it that are not learnt."""
    missing = length - len(sample.tokens)
    tokens = torch.cat([sample.tokens, torch.zeros(missing, dtype=torch.int64)])
    return replace(
        sample, tokens=tokens, loss_mask=torch.cat([sample.loss_mask, torch.zeros(missing, dtype=torch.bool)])
    )


def cases(engine: MegatronEngine, generator: torch.Generator) -> dict[str, dict[str, Pass]]:
    """By name, the ways of doing the same; the last one is what is new."""

    def way(samples: Sequence[TrainingSample], **settings: Any) -> Pass:
        return partial(build_global_batch, samples, engine.batch_layout, **{"micro_batch_size": 1, **settings})

    tail = long_tailed(64, generator)
    longest = max(len(sample.tokens) for sample in tail)
    found = {
        "long tail": {
            "each row padded to the longest": way([padded(sample, longest) for sample in tail]),
            "each row by itself": way(tail),
            "packed, 4 rows": way(tail, micro_batch_size=4),
            "packed, 4 rows, shuffled": way(tail, micro_batch_size=4, shuffle_seed=0),
            "budget of 2048 tokens": way(tail, max_tokens=LONGEST),
        }
    }
    for share in (0.0, 0.3, 0.6):
        samples = groups(ROW_TOKENS // 2, ROW_TOKENS // 2, generator)
        idle = [replace(s, advantage=0.0) if i < share * len(samples) else s for i, s in enumerate(samples)]
        settings = {"max_tokens": LONGEST}
        found[f"{share:.0%} of the rows idle"] = {
            "run": way(idle, **settings),
            "skipped": way(idle, **settings, skips_idle_rows=True),
        }
    for name, prompt_tokens in (("4:1", ROW_TOKENS * 4 // 5), ("1:1", ROW_TOKENS // 2), ("1:4", ROW_TOKENS // 5)):
        samples = groups(prompt_tokens, ROW_TOKENS - prompt_tokens, generator)
        found[f"shared prompts, {name}"] = {
            "each row": way(samples, max_tokens=LONGEST),
            "shared": way(samples, max_tokens=LONGEST, shares_prompts=True),
        }
    return found


def run(engine: MegatronEngine, make: Pass) -> tuple[float, float]:
    """(loss, gradient norm) of a pass; the weights stay."""
    totals = engine.forward_backward(make(), LOSS)
    return totals.sums["loss_rollout"], engine._gradient_norm()


def measure(engine: MegatronEngine, make: Pass) -> tuple[float, float]:
    """Wall seconds of the slower rank, CPU seconds of all."""
    dist.barrier()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    engine.forward_backward(make(), LOSS)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    seconds = torch.tensor([wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime])
    everyone = [torch.zeros(2) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, seconds)
    return max(s[0].item() for s in everyone), sum(s[1].item() for s in everyone)


def compare(engine: MegatronEngine, ways: dict[str, Pass], repeats: int) -> dict[str, Any]:
    """Medians of each way, and how many times as long as the last one it takes."""
    norms = {name: run(engine, make) for name, make in ways.items()}
    *_, (_, expected) = norms.values()
    assert all(abs(norm - expected) <= 1e-5 * expected for _, norm in norms.values()), norms
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, make in ways.items():
            seconds[name].append(measure(engine, make))
    wall = {name: statistics.median(s[0] for s in times) for name, times in seconds.items()}
    cpu = {name: statistics.median(s[1] for s in times) for name, times in seconds.items()}
    *_, newest = ways
    return {
        name: {
            "wall_seconds": wall[name],
            "cpu_seconds": cpu[name],
            "wall_over_last": wall[name] / wall[newest],
            "cpu_over_last": cpu[name] / cpu[newest],
            "rank_imbalance": make().imbalance,
            "micro_batches": len(make().micro_batches),
            "tokens_per_second": sum(make().lengths) / wall[name],
        }
        for name, make in ways.items()
    }


def work(rank: int, arguments: argparse.Namespace, model: str, port: int) -> None:
    """One of two data-parallel ranks."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    groups_ = initialize_distributed(ParallelConfig(), seed=0)
    engine = MegatronEngine(
        ModelConfig(path=model, dtype="float32"),
        ParallelConfig(),
        OptimizerConfig(),
        groups_,
        train_iters=1,
        keep_reference=False,
    )
    found = cases(engine, torch.Generator().manual_seed(0))
    results = {name: compare(engine, ways, arguments.repeats) for name, ways in found.items() if arguments.only in name}
    if rank == 0:
        text = json.dumps(
            {
                "hardware": hardware(),
                "versions": versions(["torch", "megatron-core"]),
                "settings": vars(arguments),
                **results,
            },
            indent=2,
        )
        print(text)
        if not arguments.only:
            RESULT.write_text(text + "\n", encoding="utf-8")
    shut_down_distributed()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name has this; nothing is written")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 32,
        num_key_value_heads=arguments.hidden // 64,
        head_dim=32,
        max_position_embeddings=LONGEST,
    )
    with tempfile.TemporaryDirectory() as directory, socket.socket() as free:
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(directory)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(work, (arguments, directory, port), nprocs=2)


if __name__ == "__main__":
    main()
