"""Time `chord-megatron convert` in both directions beside `cp -r` of the same files, and watch its memory.

    python tools/bench_convert.py --directory /data/bench [--size small] [--repetitions 2]

A random checkpoint shaped like Qwen2.5-7B is generated (15.2 GB; 48 GB of disk are used at a time, and freed).
Before each measurement dirty pages are written to disk and the files to be read are read once, so that all start
from the same cache state, as far as memory goes; nothing is flushed afterwards, as cp does not. Every other
repetition runs in reverse order. Anonymous memory is the highest RssAnon of /proc/PID/status, summed over the
process and its children, sampled every 20 ms. Seconds of processor time stand beside those of the clock, for
machines that are shared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from bench_environment import hardware, versions

from chord_megatron.weights.hf_config import read_architecture
from chord_megatron.weights.mapping import hf_tensors
from chord_megatron.weights.safetensors_writer import write_safetensors

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 152064,
}
SIZES = {
    "7b": QWEN_7B,
    "small": QWEN_7B | {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 8},
}
CONVERT = [sys.executable, "-m", "chord_megatron.cli", "convert"]


class Run(NamedTuple):
    """One measured command."""

    seconds: float
    cpu_seconds: float  # user and system
    rss_anon: int  # bytes at the highest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where the files go; must not exist")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/convert.json"))
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True)
    try:
        result = measure(arguments.directory, arguments.size, arguments.repetitions)
    finally:
        shutil.rmtree(arguments.directory)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def measure(directory: Path, size: str, repetitions: int) -> dict:
    """All that goes into the JSON."""
    hf, megatron, target = directory / "hf", directory / "megatron", directory / "target"
    generate(hf, SIZES[size])
    subprocess.run([*CONVERT, "hf-to-megatron", hf, megatron], check=True)
    runs = {
        "cp of the Hugging Face files": (["cp", "-r"], hf),
        "hf-to-megatron": ([*CONVERT, "hf-to-megatron"], hf),
        "cp of the Megatron files": (["cp", "-r"], megatron),
        "megatron-to-hf": ([*CONVERT, "megatron-to-hf"], megatron),
    }
    measured: dict[str, list[Run]] = {name: [] for name in runs}
    for repetition in range(repetitions):
        for name, (command, source) in list(runs.items())[:: -1 if repetition % 2 else 1]:
            prepare(source)
            measured[name].append(timed([*command, str(source), str(target)]))
            print(name, measured[name][-1], file=sys.stderr)
            shutil.rmtree(target)
    nbytes = {name: folder_bytes(source) for name, (_, source) in runs.items()}
    seconds = {name: statistics.median(run.seconds for run in runs) for name, runs in measured.items()}
    return {
        "what": f"chord-megatron convert of a {size} bfloat16 Qwen2, processes started and ended, beside cp -r",
        "cache": "source read once and dirty pages written before each measurement; order reversed every other time",
        "size": size,
        "repetitions": repetitions,
        "measurements": {
            name: {
                "bytes": nbytes[name],
                "seconds": round(seconds[name], 2),
                "all_seconds": [round(run.seconds, 2) for run in runs],
                "cpu_seconds": [round(run.cpu_seconds, 2) for run in runs],
                "gigabytes_per_second": round(nbytes[name] / 1e9 / seconds[name], 3),
                "peak_rss_anon_bytes": max(run.rss_anon for run in runs),
            }
            for name, runs in measured.items()
        },
        "hf_to_megatron_time_over_cp": round(seconds["hf-to-megatron"] / seconds["cp of the Hugging Face files"], 3),
        "megatron_to_hf_time_over_cp": round(seconds["megatron-to-hf"] / seconds["cp of the Megatron files"], 3),
        "hardware": hardware(),
        "versions": versions(("torch", "megatron-core", "safetensors")),
    }


def generate(directory: Path, config: dict) -> None:
    """A checkpoint of random bits in shards of 5 GB, a tensor in memory at a time."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    specs = hf_tensors(read_architecture(directory), torch.bfloat16)
    largest = max(spec.nbytes for spec in specs.values())
    bits = torch.randint(-(2**63), 2**63 - 1, (largest // 8 + len(specs),)).view(torch.bfloat16)
    # Each tensor starts elsewhere in them, so that a mix-up would show.
    stream = (
        (name, bits[number : number + torch.Size(spec.shape).numel()].view(spec.shape))
        for number, (name, spec) in enumerate(specs.items())
    )
    write_safetensors(directory, specs, stream)


def prepare(source: Path) -> None:
    """The cache state that every measurement starts from."""
    os.sync()
    buffer = bytearray(16 * 2**20)
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def timed(command: list[str]) -> Run:
    """Run a command from start to end."""
    start, cpu_start = time.monotonic(), children_cpu_seconds()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, rss_anon(process))
        time.sleep(0.02)
    seconds = time.monotonic() - start
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
    return Run(seconds, children_cpu_seconds() - cpu_start, peak)


def children_cpu_seconds() -> float:
    """Processor time of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def rss_anon(process: psutil.Process) -> int:
    """Bytes over a process and its children; 0 for one that has just ended."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            status = Path(f"/proc/{one.pid}/status").read_text(encoding="utf-8")
            total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    except (OSError, psutil.NoSuchProcess):
        pass
    return total


def folder_bytes(directory: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in directory.iterdir())


if __name__ == "__main__":
    main()
