"""Time the embedded engine's decoding: cohorts one behind the other or one alone, prompts read once or for each row.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tools/bench_decoding.py --directory /data/bench

A random Llama of the size of SmolLM2-135M in float32 under PP = number of processes; every row is drawn to the end.
The four ways take turns, so that what else the machine does meets all of them; of each the fastest and the median.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from bench_environment import hardware, versions
from transformers import LlamaConfig, LlamaForCausalLM

from chord_megatron.backend import cohort, generation
from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import initialize_distributed, shut_down_distributed
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.types import SamplingParams

SIZE_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
PIPELINED, ONE_COHORT, ONCE, EACH = "one cohort a stage", "one cohort", "prompts once", "prompts for each row"
WAYS = {f"{cohorts}, {prompts}": (cohorts, prompts) for cohorts in (PIPELINED, ONE_COHORT) for prompts in (ONCE, EACH)}
AS_BEFORE = f"{ONE_COHORT}, {EACH}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where the model goes; must not exist")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--generations", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32, help="of each completion")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/decoding.json"))
    arguments = parser.parse_args()
    parallel = ParallelConfig(pipeline_model_parallel_size=int(os.environ["WORLD_SIZE"]))
    groups = initialize_distributed(parallel, seed=0)
    if groups.rank == 0:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SIZE_135M)).save_pretrained(arguments.directory)
    dist.barrier()
    model = ModelConfig(path=str(arguments.directory), dtype="float32")
    engine = MegatronEngine(model, parallel, OptimizerConfig(), groups, train_iters=1, keep_reference=False)
    result = measure(engine, arguments)
    if groups.rank == 0:
        shutil.rmtree(arguments.directory)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result, indent=2))
    shut_down_distributed()


def measure(engine: MegatronEngine, arguments: argparse.Namespace) -> dict:
    """All that goes into the JSON."""
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.prompts, arguments.prompt_tokens)
    prompts = torch.randint(SIZE_135M["vocab_size"], shape, generator=generator).tolist()
    rows = [prompt for prompt in prompts for _ in range(arguments.generations)]

    def draw(tokens: int) -> list[list[int]]:
        seeds, params = [(0, row) for row in range(len(rows))], SamplingParams(max_completion_length=tokens)
        return [completion.tolist() for completion, _ in engine.generate(rows, seeds, params)]

    seconds: dict[str, dict[str, list[float]]] = {"whole": {}, "first token": {}}
    drawn = draw(1)  # the first one also starts the connections
    for _ in range(arguments.repetitions):
        for way, (cohorts, reading) in WAYS.items():
            with ExitStack() as patches:
                if cohorts == ONE_COHORT:
                    patches.enter_context(patch.object(generation, "number_of_cohorts", lambda *_: 1))
                if reading == EACH:
                    each = lambda prompts: (prompts, range(len(prompts)))  # noqa: E731
                    patches.enter_context(patch.object(cohort, "distinct", each))
                for part, tokens in (("whole", arguments.tokens), ("first token", 1)):
                    taken, completions = timed(lambda tokens=tokens: draw(tokens))
                    seconds[part].setdefault(way, []).append(taken)
                    assert [row[0] for row in completions] == [row[0] for row in drawn]
    return {
        "what": f"decoding a random Llama of 135M parameters in float32 under PP {engine.groups.pp_size}, gloo",
        "settings": {key: value for key, value in vars(arguments).items() if isinstance(value, int)},
        "measurements": {
            way: {
                "seconds": [round(value, 3) for value in seconds["whole"][way]],
                "seconds_to_first_token": [round(value, 3) for value in seconds["first token"][way]],
                "tokens_per_second": round(len(rows) * arguments.tokens / statistics.median(seconds["whole"][way]), 1),
                "tokens_per_second_at_best": round(len(rows) * arguments.tokens / min(seconds["whole"][way]), 1),
            }
            for way in WAYS
        },
        "times_as_fast_as_before": {
            part: {
                way: {
                    "median": round(statistics.median(of_part[AS_BEFORE]) / statistics.median(of_part[way]), 2),
                    "best": round(min(of_part[AS_BEFORE]) / min(of_part[way]), 2),
                }
                for way in WAYS
            }
            for part, of_part in seconds.items()
        },
        "hardware": hardware(),
        "versions": versions(("torch", "megatron-core")),
    }


def timed(action: Callable[[], list]) -> tuple[float, list]:
    """Seconds until all ranks are done, and what it returned."""
    dist.barrier()
    start = time.monotonic()
    result = action()
    dist.barrier()
    return time.monotonic() - start, result


if __name__ == "__main__":
    main()
