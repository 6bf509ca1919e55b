"""Records what five steps compute, bit for bit: `python tests/e2e/record_numbers.py OUT.json`.

Losses and other metrics, sampled tokens, weights and exported bytes of small runs under four layouts, through the
command line alone, so that any version of the code can record and be compared.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import read_lines, read_metrics, succeeded, train_on_forks, weights, write_config, write_rows
from safetensors.torch import load_file
from tiny_families import make_model
from tiny_model import byte_tokenizer

HERE = Path(__file__).parent
RECORDING = HERE / "recorded_numbers.json"
STEPS = 5
REWARD = (HERE.parent / "distributed" / "hash_reward.py").resolve()

# model, overrides; two processes each.
LAYOUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "TP 2": ("qwen3", ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")),
    "PP 2 x VPP 2": (
        "qwen3",
        ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"),
    ),
    "DP 2": ("qwen3", ("optimizer.use_distributed_optimizer=true",)),
    "EP 2": ("qwen3_moe", ("parallel.expert_model_parallel_size=2",)),
}
CASES: dict[str, tuple[str, ...]] = {
    "on-policy": (
        "chord.chord_enable_phi_function=true",
        "chord.chord_mu_peak=0.9",
        "chord.chord_mu_valley=0.1",
        "chord.chord_mu_decay_steps=4",
        "grpo.overlong_filter=true",
        "train.packing_order=shuffled",
    ),
    "off-policy": (
        "chord.chord_mu_peak=0.3",
        "chord.chord_mu_valley=0.3",
        f"grpo.num_iterations={STEPS}",
        "grpo.epsilon=0.02",
        "grpo.epsilon_high=0.03",
        "grpo.beta=0.1",
        "grpo.loss_type=grpo",
        "grpo.rollout_importance_sampling_mode=sequence_mask",
        "grpo.rollout_importance_sampling_threshold=1.01",
        "rollout.temperature=0.8",
        "optimizer.lr=2e-4",
    ),
}


def record(root: Path, layout: str, case: str) -> dict[str, Any]:
    """Train one case under one layout, in a new folder; returns what it computed."""
    model_name, settings = LAYOUTS[layout]
    directory = root / f"{layout}, {case}".replace(" ", "_").replace(",", "")
    (directory / "model").mkdir(parents=True)
    _write_inputs(directory, model_name)
    config = write_config(directory, directory)
    rollouts = directory / "rollouts.jsonl"
    overrides = (
        f"train.train_iters={STEPS}",
        "train.save_steps=null",
        "train.micro_batch_size=2",
        f"rewards.reward_funcs=['{REWARD}:hash_reward']",
        f"rollout.record_to={rollouts}",
        "rollout.max_completion_length=16",
        # The recording is older than these; with them losses differ by 4e-7 at most.
        "train.share_prompts=false",
        "train.skip_idle_rows=false",
    )
    succeeded(train_on_forks(config, *overrides, *settings, *CASES[case]))
    run = directory / "run"
    tensors = load_file(run / "hf" / f"step_{STEPS}" / "model.safetensors")
    return {
        # The reward's name holds a path.
        "metrics": [{key.split("/")[0]: _hex(value) for key, value in line.items()} for line in read_metrics(run)],
        "tokens": [line["tokens"] for line in read_lines(rollouts)],
        "rollout_log_probs": _sha256(json.dumps([line["rollout_log_probs"] for line in read_lines(rollouts)]).encode()),
        "weights": {name: _sha256(tensor.view(torch.uint8).numpy().tobytes()) for name, tensor in tensors.items()},
        "weight_sums": {name: tensor.double().sum().item() for name, tensor in weights(run, STEPS).items()},
        "exported": {
            path.name: _sha256(path.read_bytes())
            for path in sorted((run / "hf" / f"step_{STEPS}").iterdir())
            if path.suffix == ".safetensors"
        },
    }


def environment() -> dict[str, str]:
    """What rounding depends on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "torch": torch.__version__,
        "cpu": cpu.partition(":")[2].strip() or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _write_inputs(directory: Path, model_name: str) -> None:
    tokenizer = byte_tokenizer()
    model = make_model(model_name, vocab_size=len(tokenizer), max_position_embeddings=1024)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    write_rows(
        directory / "prompts.jsonl", [{"prompt": f"{n} + {n + 3} =", "answer": f"{2 * n + 3}"} for n in range(24)]
    )
    write_rows(directory / "experts.jsonl", [{"prompt": f"{n} + {n} =", "answer": f"it is {2 * n}"} for n in range(16)])


def _hex(value: object) -> object:
    return value.hex() if isinstance(value, float) else value


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main(path: Path) -> None:
    """Record every case under every layout."""
    with tempfile.TemporaryDirectory() as root:
        runs = {f"{layout}, {case}": record(Path(root), layout, case) for layout in LAYOUTS for case in CASES}
    path.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
