"""Time for which a checkpoint holds up training: written in the foreground, and in the background.

    python tools/bench_save.py --directory /data/bench

A random bfloat16 model of 115 million parameters takes a step, and is then saved several times in each way, by turns,
with either optimizer: the distributed one is first gathered, which is no part of the writing. Nothing else runs while
the thread writes: beside training it takes longer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from bench_convert import QWEN_7B, folder_bytes, generate
from bench_environment import hardware, versions

from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import ParallelGroups, initialize_distributed, shut_down_distributed
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.types import LossResult, TrainingSample

REPETITIONS = 3
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "vocab_size": 32000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where the files go; must not exist")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/save.json"))
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True)
    try:
        generate(arguments.directory / "hf", QWEN_7B | SIZES)
        result = measure(arguments.directory)
    finally:
        shutil.rmtree(arguments.directory)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    shut_down_distributed()


def measure(directory: Path) -> dict[str, Any]:
    """All that goes into the JSON."""
    groups = initialize_distributed(ParallelConfig(), seed=0)
    seconds = {
        name: time_saves(trained_engine(directory / "hf", groups, distributed=distributed), directory / "checkpoint")
        for name, distributed in (("plain optimizer", False), ("distributed optimizer", True))
    }
    return {
        "what": "seconds for which saving a checkpoint holds up training, one process on the CPU",
        "bytes": folder_bytes(directory / "checkpoint"),
        "repetitions": REPETITIONS,
        "seconds": seconds,
        "held_up_less": {name: round(min(of["foreground"]) / min(of["background"]), 2) for name, of in seconds.items()},
        "hardware": hardware(),
        "versions": versions(("torch", "megatron-core")),
    }


def time_saves(engine: MegatronEngine, target: Path) -> dict[str, list[float]]:
    """Of each repetition, in seconds."""
    engine.save(target, {})  # the first one allocates
    found: dict[str, list[float]] = {"foreground": [], "background": [], "background, until it is there": []}
    for _ in range(REPETITIONS):
        start = time.monotonic()
        engine.save(target, {})
        found["foreground"].append(round(time.monotonic() - start, 2))
        start = time.monotonic()
        with engine.saving(target, {}, in_background=True):
            found["background"].append(round(time.monotonic() - start, 2))
        found["background, until it is there"].append(round(time.monotonic() - start, 2))
    return found


def trained_engine(model_dir: Path, groups: ParallelGroups, *, distributed: bool) -> MegatronEngine:
    """After one step of the sum of the log-probs, so that the optimizer has its state."""
    engine = MegatronEngine(
        ModelConfig(path=str(model_dir)),
        ParallelConfig(),
        OptimizerConfig(use_distributed_optimizer=distributed),
        groups,
        train_iters=1,
        keep_reference=False,
    )
    tokens = torch.arange(8)
    sample = TrainingSample(tokens, torch.ones(8, dtype=torch.bool), is_expert=True, temperature=1.0)
    batch = build_global_batch([sample], engine.batch_layout, micro_batch_size=1)
    numbers = {"count": torch.ones((), dtype=torch.float64)}
    engine.forward_backward(batch, lambda log_probs, *_: LossResult(-log_probs.sum(), numbers, numbers, {}))
    engine.optimizer_step()
    return engine


if __name__ == "__main__":
    main()
