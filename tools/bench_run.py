"""Seconds of a whole step of training on one process, where most of what is read are prompts.

A Qwen3 of 2.5 million random weights over bytes; 8 prompts of about 135 tokens x 8 completions of up to 32, and 8
expert rows. Random weights earn no reward, so that no completion has a gradient; a second reward tells completions
apart. Each is trained with and without train.share_prompts and train.skip_idle_rows, in turn, by `chord-megatron
train`; the medians are those of metrics.jsonl without the first steps. `python tools/bench_run.py` writes
benchmarks/results/run.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_environment import hardware, versions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "run.json"
TIMES = ("time_step", "time_rollout", "time_reward", "time_train")
END, PAD = "<end>", "<pad>"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
REWARDS = "def none(completions, **columns):\n    return [0.0] * len(completions)\n\n\n" + (
    "def length(completions, **columns):\n    return [float(len(completion)) for completion in completions]\n"
)
WAYS = {
    "every row by itself": ("train.share_prompts=false", "train.skip_idle_rows=false"),
    "shared prompts, idle rows skipped": (),
}


def write_inputs(directory: Path) -> None:
    """Model, tokenizer, data and rewards."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate([END, PAD, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, chat_template=TEMPLATE)
    fast.save_pretrained(directory / "model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(fast),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory / "model")
    question = "A shop has {a} apples and gets {b} more. How many apples does it have in all? Think first, then write "
    question += "the number behind four signs: "
    rows = [{"prompt": question.format(a=100 + n, b=900 - n), "answer": "#### 1000"} for n in range(64)]
    for name in ("prompts", "experts"):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (directory / "rewards.py").write_text(REWARDS, encoding="utf-8")


def configuration(directory: Path, reward: str) -> dict[str, Any]:
    """As YAML takes it: JSON."""
    return {
        "model": {"path": str(directory / "model"), "dtype": "float32"},
        "data": {"dataset": str(directory / "prompts.jsonl"), "max_prompt_length": 160},
        "rewards": {"reward_funcs": [f"{directory / 'rewards.py'}:{reward}"]},
        "rollout": {"num_generations": 8, "max_completion_length": 32},
        "chord": {"chord_sft_dataset": str(directory / "experts.jsonl"), "chord_sft_global_batch_size": 8},
        "train": {"global_batch_size": 64, "max_tokens_per_micro_batch": 8192, "output_dir": ""},
        "tracking": {"report_to": [], "log_completions": 0},
    }


def train(directory: Path, reward: str, steps: int, overrides: tuple[str, ...]) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    with tempfile.TemporaryDirectory(dir=directory) as run:
        path = directory / "config.yaml"
        path.write_text(json.dumps(configuration(directory, reward)), encoding="utf-8")
        command = [sys.executable, "-m", "chord_megatron.cli", "train", str(path), f"train.train_iters={steps}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
        subprocess.run(
            [*command, f"train.output_dir={run}/run", *overrides],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        return [json.loads(line) for line in Path(run, "run", "metrics.jsonl").read_text("utf-8").splitlines()]


def compare(directory: Path, reward: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of each way, and how many times as long a step takes without."""
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for _ in range(arguments.repeats):
        for name, overrides in WAYS.items():
            lines[name] += train(directory, reward, arguments.steps, overrides)[arguments.warm_up :]
    medians = {
        name: {key: statistics.median(line[key] for line in found) for key in (*TIMES, "skipped_rows")}
        for name, found in lines.items()
    }
    before, now = (medians[name]["time_step"] for name in WAYS)
    return {**medians, "ratio": before / now}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_inputs(directory)
        results = {
            "no completion has a gradient": compare(directory, "none", arguments),
            "every completion has one": compare(directory, "length", arguments),
        }
    text = json.dumps(
        {
            "hardware": hardware(),
            "versions": versions(["torch", "megatron-core"]),
            "settings": vars(arguments),
            **results,
        },
        indent=2,
    )
    RESULT.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
