"""Time the export of full Hugging Face tensors from a live model, beside a memcpy of the same bytes.

    torchrun --nproc-per-node 2 tools/bench_export.py --directory /data/bench [--size small]

A random checkpoint is generated, loaded at tensor-parallel size = number of processes, and exported several times
with buckets of several sizes. Memory is RssAnon of rank 0 at its highest while exporting, above what it was
before: the buckets, and the full tensors of one parameter.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from bench_convert import SIZES, generate, rss_anon
from bench_environment import hardware, versions

from chord_megatron.backend.groups import initialize_distributed, shut_down_distributed
from chord_megatron.backend.hf_weights import export_hf_weights, load_hf_weights
from chord_megatron.backend.model import build_model_chunks
from chord_megatron.config import ModelConfig, ParallelConfig
from chord_megatron.weights.hf_config import read_architecture

BUCKET_MEGABYTES = (64, 256, 1024)
REPETITIONS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where the files go; must not exist")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/export.json"))
    arguments = parser.parse_args()
    tp_size = int(os.environ["WORLD_SIZE"])
    parallel = ParallelConfig(tensor_model_parallel_size=tp_size, sequence_parallel=tp_size > 1)
    groups = initialize_distributed(parallel, seed=0)
    if groups.rank == 0:
        arguments.directory.mkdir(parents=True)
        generate(arguments.directory / "hf", SIZES[arguments.size])
    dist.barrier()
    arch = read_architecture(arguments.directory / "hf")
    model = ModelConfig(path=str(arguments.directory / "hf"), dtype="bfloat16")
    chunks = build_model_chunks(arch, model, parallel, groups)
    load_hf_weights(chunks, arguments.directory / "hf", arch, groups)

    def export(megabytes: int) -> int:
        """Bytes that came out."""
        return sum(tensor.nbytes for _, tensor in export_hf_weights(chunks, arch, groups, megabytes * 10**6))

    result = measure(export, arguments.size, tp_size)
    if groups.rank == 0:
        shutil.rmtree(arguments.directory)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result, indent=2))
    shut_down_distributed()


def measure(export: Callable[[int], int], size: str, tp_size: int) -> dict:
    """All that goes into the JSON."""
    nbytes = export(BUCKET_MEGABYTES[0])  # the first one also starts the connections
    copies = time_copies(nbytes)
    exports, memory = {}, {}
    for megabytes in BUCKET_MEGABYTES:
        runs = [timed(partial(export, megabytes)) for _ in range(REPETITIONS)]
        exports[f"export, buckets of {megabytes} MB"] = [seconds for seconds, _ in runs]
        memory[f"export, buckets of {megabytes} MB"] = max(peak for _, peak in runs)
    return {
        "what": f"export_hf_weights of a {size} bfloat16 Qwen2 from a live model at TP {tp_size}, gloo",
        "bytes": nbytes,
        "repetitions": REPETITIONS,
        "measurements": {
            name: {
                "seconds": [round(seconds, 3) for seconds in times],
                "gigabytes_per_second": round(nbytes / 1e9 / min(times), 3),
                **({"peak_extra_rss_anon_bytes": memory[name]} if name in memory else {}),
            }
            for name, times in (copies | exports).items()
        },
        "hardware": hardware(),
        "versions": versions(("torch", "megatron-core")),
    }


def time_copies(nbytes: int) -> dict[str, list[float]]:
    """Seconds of a memcpy of so many bytes on every rank at the same time."""
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    return {
        "memcpy into memory in use": [timed(partial(target.copy_, source))[0] for _ in range(REPETITIONS)],
        "memcpy into new memory": [timed(source.clone)[0] for _ in range(REPETITIONS)],
    }


def timed(action: Callable[[], object]) -> tuple[float, int]:
    """Seconds until all ranks are done, and the highest anonymous memory above that at the start."""
    process, peaks, done = psutil.Process(), [0], threading.Event()
    before = rss_anon(process)

    def watch() -> None:
        while not done.wait(0.01):
            peaks[0] = max(peaks[0], rss_anon(process) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    dist.barrier()
    start = time.monotonic()
    action()
    dist.barrier()
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    return seconds, peaks[0]


if __name__ == "__main__":
    main()
