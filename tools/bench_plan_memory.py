"""Compare the memory that the planner computes with what training runs on this machine take.

    python tools/bench_plan_memory.py [--only NAME ...] [--output benchmarks/results/plan_memory.json]

Each case is a run of `python -m chord_megatron.train`, a process for each rank, of a random model with all its rows as
long as the configuration allows: the case that the planner computes. Measured is the largest resident memory of each
rank up to the end of its last step (VmHWM), minus the resident memory of the same run with a model of a few thousand
parameters at that moment (VmRSS): interpreter, libraries, data and process groups. MALLOC_MMAP_THRESHOLD_=131072 has
glibc give every larger tensor back to the system when it is freed, instead of keeping the memory for the next one: what
is measured are live tensors. What the output file holds of other cases stays there.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from bench_environment import hardware, versions
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chord_megatron.config import load_config
from chord_megatron.planning.plan import make_plan
from chord_megatron.planning.rank_memory import rank_memories
from chord_megatron.weights.hf_config import read_architecture
from chord_megatron.weights.mapping import hf_tensors

STEPS = 2  # the first one makes the optimizer's moments
MICRO_BATCHES = 2  # a step, on each data-parallel rank
ROW = 512  # tokens
DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_hidden_layers": 10,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 16384,
    "max_position_embeddings": 2048,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
MOE = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
}
TINY = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "vocab_size": 128}
TINY |= {"num_attention_heads": 4, "num_hidden_layers": 4}


@dataclass(frozen=True)
class Case:
    """A layout."""

    processes: int
    settings: dict[str, Any] = field(default_factory=dict)  # group.key -> value
    model: dict[str, Any] = field(default_factory=lambda: DENSE)
    data_parallel: int = 1
    draws: bool = False  # completions with the training weights, whose rows all teach nothing and are not trained on


TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
VPP, LAYOUT = "parallel.virtual_pipeline_model_parallel_size", "parallel.pipeline_layout"
ROWS = "train.micro_batch_size"
CASES = {
    "one process": Case(1),
    "TP 2, sequence parallel": Case(2, {TP: 2, "parallel.sequence_parallel": True}),
    "PP 2": Case(2, {PP: 2}),
    "DP 2, distributed optimizer": Case(2, {"optimizer.use_distributed_optimizer": True}, data_parallel=2),
    "recomputation, 4 rows": Case(1, {"model.recompute": True, ROWS: 4}),
    "6 rows": Case(1, {ROWS: 6}),
    "TP 2": Case(2, {TP: 2}),
    "PP 2 x VPP 2": Case(2, {PP: 2, VPP: 2, LAYOUT: [2, 3, 3, 2]}),
    "bfloat16": Case(1, {"model.dtype": "bfloat16"}),
    "EP 2": Case(2, {"parallel.expert_model_parallel_size": 2}, MOE, data_parallel=2),
    "CP 2": Case(2, {"parallel.context_parallel_size": 2}),
    "parts computed again": Case(1, {"model.recompute": ["layernorm", "mlp"]}),
    "drawing 64 rows": Case(1, draws=True),
}


def write_model(folder: Path, settings: dict[str, Any]) -> None:
    """Random weights, and a tokenizer of two words."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    tensors = hf_tensors(read_architecture(folder), torch.float32)
    save_file({name: 0.02 * torch.randn(spec.shape) for name, spec in tensors.items()}, folder / "model.safetensors")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)


def write_config(folder: Path, model: Path, case: Case) -> Path:
    """Of a run over rows of ROW tokens, the end token included, that share no prompt."""
    half = ROW // 2
    numbers = (f"{number:0{half}b}".translate({48: "a", 49: "b"}) for number in range(64))
    answer = " " + " ".join("b" * (ROW - half - 1))
    rows = [{"prompt": " ".join(number), "answer": "42" if case.draws else answer} for number in numbers]
    data = folder / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    size = case.settings.get(ROWS, 2)
    num_rows = MICRO_BATCHES * size * case.data_parallel
    config: dict[str, dict[str, Any]] = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"prompt_format": "text"},
        "rollout": {"num_generations": 1},
        "chord": {
            "chord_sft_dataset": str(data),
            "chord_sft_max_length": ROW,
            "chord_sft_global_batch_size": num_rows,
            "mu_schedule": "constant",
            "chord_mu_peak": 1.0,
        },
        "train": {
            "output_dir": str(folder / "run"),
            "micro_batch_size": size,
            "global_batch_size": num_rows,
            "train_iters": STEPS,
        },
        "tracking": {"report_to": []},
    }
    if case.draws:
        config["data"] |= {"dataset": str(data), "max_prompt_length": half}
        config["rollout"] = {"num_generations": 8, "max_completion_length": 16}
        config["chord"] = {"mu_schedule": "constant", "chord_mu_peak": 0.0}
        config["train"] |= {"micro_batch_size": 1, "global_batch_size": 64}
    for key, value in case.settings.items():
        group, leaf = key.split(".")
        config.setdefault(group, {})[leaf] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def run(config: Path, processes: int) -> list[dict[str, int]]:
    """Resident memory of each rank after the last step, in bytes: the largest so far (VmHWM), that moment's (VmRSS)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    command = [sys.executable, __file__, "--rank-of", str(config)]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=sys.stderr)
        for rank in range(processes)
    ]
    if any(code for code in [rank.wait() for rank in ranks]):
        raise SystemExit(f"{config}: a rank failed")
    return [json.loads((config.parent / f"rank_{rank}").read_text(encoding="utf-8")) for rank in range(processes)]


def be_rank(config: Path) -> int:
    """One process of the run, which leaves in a file what it takes where it logs its peak memory: after each step."""
    from chord_megatron.training import run
    from chord_megatron.training.main import main

    logged = run._peak_memory_bytes

    def note() -> int:
        lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
        found = {name[:-1]: int(rest[0]) * 1024 for name, *rest in lines if name in ("VmHWM:", "VmRSS:")}
        (config.parent / f"rank_{os.environ['RANK']}").write_text(json.dumps(found), encoding="utf-8")
        return logged()

    run._peak_memory_bytes = note
    return main([str(config)])


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Computed and measured bytes of each rank."""
    found = {}
    for name, model in (("model", case.model), ("tiny", case.model | TINY)):
        (folder / name).mkdir()
        write_model(folder / name / "assets", model)
        settings = {key: value for key, value in case.settings.items() if name == "model" or key != LAYOUT}
        config = write_config(folder / name, folder / name / "assets", replace(case, settings=settings))
        found[name] = run(config, case.processes)
    arch, config = read_architecture(folder / "model" / "assets"), load_config(folder / "model" / "config.yaml")
    stages = rank_memories(config, arch, make_plan(config, arch, case.processes), layers="local")
    ranks = []
    for rank, (whole, tiny) in enumerate(zip(found["model"], found["tiny"])):
        stage, measured = stages[rank * len(stages) // case.processes], whole["VmHWM"] - tiny["VmRSS"]
        ranks.append(
            {
                "computed_bytes": stage.peak,
                "measured_bytes": measured,
                "computed_over_measured": stage.peak / measured,
                "libraries_bytes": tiny["VmRSS"],
                "computed_parts": stage.parts(),
            }
        )
    return {"processes": case.processes, "settings": case.settings, "ranks": ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/plan_memory.json"))
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        sys.exit(be_rank(arguments.rank_of))
    results = json.loads(arguments.output.read_text())["cases"] if arguments.output.exists() else {}
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(CASES[name], Path(folder))
        for rank, found in enumerate(results[name]["ranks"]):
            computed, measured = found["computed_bytes"] / 1e6, found["measured_bytes"] / 1e6
            ratio = found["computed_over_measured"]
            print(
                f"{name}, rank {rank}: computed {computed:.0f} MB, measured {measured:.0f} MB: {ratio:.3f}", flush=True
            )
    packages = ("torch", "megatron-core", "transformers")
    document = {"hardware": hardware(), "versions": versions(packages), "cases": results}
    arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
