"""Time the embedded engine's decoding: cohorts one behind the other or one alone, prompts read once or for each row.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tools/bench_decoding.py --directory /data/bench

A random Llama of the size of SmolLM2-135M in float32 under PP = number of processes, its layers cut by what they cost;
every row is drawn to the end. The four ways take turns, so that what else the machine does meets all of them.

Where a core is shared, the clock says more of the others than of this. So the processor time of each stage in each tick
is counted, too: the slowest stage of each tick, summed, is the time on cores of one's own, without messages.
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
from typing import Any, NamedTuple
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
    parallel = ParallelConfig(pipeline_model_parallel_size=int(os.environ["WORLD_SIZE"]), pipeline_layout="auto")
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

    expected = draw(1)  # the first one also starts the connections
    runs: dict[str, list[Run]] = {f"{part}, {way}": [] for way in WAYS for part in ("first token", "all tokens")}
    for _ in range(arguments.repetitions):
        for way, (cohorts, reading) in WAYS.items():
            with ExitStack() as patches:
                if cohorts == ONE_COHORT:
                    patches.enter_context(patch.object(generation, "number_of_cohorts", lambda *_: 1))
                if reading == EACH:
                    each = lambda prompts: (prompts, range(len(prompts)))  # noqa: E731
                    patches.enter_context(patch.object(cohort, "distinct", each))
                for part, tokens in (("first token", 1), ("all tokens", arguments.tokens)):
                    run, completions = timed(lambda tokens=tokens: draw(tokens), engine)
                    runs[f"{part}, {way}"].append(run)
                    assert [row[0] for row in completions] == [row[0] for row in expected]
    medians = {
        name: {key: statistics.median(getattr(run, key) for run in of_name) for key in Run._fields}
        for name, of_name in runs.items()
    }
    return {
        "what": f"decoding a random Llama of 135M parameters in float32 under PP {engine.groups.pp_size}, gloo",
        "settings": {key: value for key, value in vars(arguments).items() if isinstance(value, int)},
        "measurements": {
            name: described(of_name, len(rows) * (1 if name.startswith("first") else arguments.tokens))
            for name, of_name in runs.items()
        },
        "times_as_fast_as_one_cohort_that_reads_prompts_for_each_row": {
            name: {
                key: round(medians[f"{name.partition(',')[0]}, {AS_BEFORE}"][key] / medians[name][key], 2)
                for key in ("seconds", "cpu_seconds_of_the_slowest_stage")
            }
            for name in runs
        },
        "load_average": os.getloadavg()[0],
        "hardware": hardware(),
        "versions": versions(("torch", "megatron-core")),
    }


class Run(NamedTuple):
    """One measurement."""

    seconds: float
    cpu_seconds_of_the_slowest_stage: float  # summed over the ticks
    busy: float  # the share of all stages' time that these would work


def described(runs: list[Run], num_tokens: int) -> dict:
    """Of the runs of one name, which draw that many tokens."""
    slowest, busy = (statistics.median(getattr(run, key) for run in runs) for key in Run._fields[1:])
    return {
        "seconds": [round(run.seconds, 2) for run in runs],
        "cpu_seconds_of_the_slowest_stage": [round(run.cpu_seconds_of_the_slowest_stage, 2) for run in runs],
        "tokens_per_second": round(num_tokens / statistics.median(run.seconds for run in runs), 1),
        "tokens_per_second_on_cores_of_its_own": round(num_tokens / slowest, 1),
        "stages_busy": round(busy, 2),
    }


def timed(action: Callable[[], list], engine: MegatronEngine) -> tuple[Run, list]:
    """Seconds until all ranks are done, what each tick took of each stage, and what the action returned."""
    ticks = [time.process_time()]
    hand_on = generation._Pipeline._hand_on

    def noted(*args: Any) -> Any:
        ticks.append(time.process_time())
        return hand_on(*args)

    dist.barrier()
    start = time.monotonic()
    with patch.object(generation._Pipeline, "_hand_on", noted):
        result = action()
    dist.barrier()
    seconds = time.monotonic() - start
    of_stages = [torch.empty(len(ticks) - 1, dtype=torch.float64) for _ in range(engine.groups.pp_size)]
    dist.all_gather(of_stages, torch.tensor(ticks, dtype=torch.float64).diff(), group=engine.groups.pp_group)
    by_tick = torch.stack(of_stages)
    slowest = by_tick.amax(0).sum().item()
    return Run(seconds, slowest, by_tick.sum().item() / (len(of_stages) * slowest)), result


if __name__ == "__main__":
    main()
