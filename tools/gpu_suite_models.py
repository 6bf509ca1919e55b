"""What the parts of tools/gpu_suite.py train: shapes, sizes and the arithmetic of their FLOPs. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

END = "<end>"

# Dense bf16 TFLOP/s of NVIDIA's data sheets (those print twice as much, with sparsity); the first whose words all
# stand in the GPU's name.
DATA_SHEETS = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "A100": 312}


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5 model's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool
    note: str

    @property
    def layer_weights(self) -> int:
        """Weights of all layers that multiply each token; biases and norms left out."""
        head_dim = self.hidden_size // self.num_attention_heads
        attention = 2 * self.hidden_size * head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.hidden_size * self.vocab_size


@dataclass(frozen=True)
class Sizes:
    """Of a training step. Prompts, completions and answers have one length each; no completion ends early."""

    prompt_tokens: int
    completion_tokens: int
    completions: int
    num_generations: int
    experts: int
    answer_tokens: int  # without the end token
    micro_batch_size: int
    steps: int
    warm_up: int  # steps left out of the medians
    generation_batches: tuple[int, ...]
    dtype: Literal["float32", "bfloat16"]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence of a step."""
        rollout = self.prompt_tokens + self.completion_tokens
        expert = self.prompt_tokens + self.answer_tokens + 1
        return [rollout] * self.completions + [expert] * self.experts

    @property
    def loss_tokens(self) -> int:
        return self.completions * self.completion_tokens + self.experts * (self.answer_tokens + 1)


SHAPES = {
    "0.5b": Shape(896, 4864, 24, 14, 2, 151936, True, "Qwen2.5-0.5B's shape, random weights"),
    "7b": Shape(
        3584, 18944, 4, 28, 4, 152064, False, "4 of Qwen2.5-7B's 28 layers, random weights: the head weighs 7 x as much"
    ),
}
TINY_SHAPES = {name: Shape(64, 128, 2, 4, 2, 512, shape.tie_word_embeddings, "tiny") for name, shape in SHAPES.items()}
SIZES = Sizes(256, 256, 64, 8, 16, 255, 16, 8, 2, (1, 64, 256), "bfloat16")
TINY_SIZES = Sizes(8, 4, 8, 4, 4, 3, 4, 3, 1, (1, 4), "float32")


def step_flops(shape: Shape, lengths: Sequence[int], loss_tokens: int) -> dict[str, float]:
    """FLOPs that forward and backward of a step need: 6 per weight and token, and the attention's.

    As in appendix B of PaLM (arXiv 2204.02311), with two differences that make it smaller: attention is causal, so
    6 L H Q per token and position instead of 12, and the head is needed at the tokens of the loss only. Nothing
    counts twice that is recomputed.
    """
    attention = 6.0 * shape.num_hidden_layers * shape.hidden_size * sum(length**2 for length in lengths)
    layers = 6.0 * shape.layer_weights * sum(lengths)
    head = 6.0 * shape.head_weights * loss_tokens
    return {"layers": layers, "head": head, "attention": attention, "sum": layers + head + attention}


def mfu(flops: float, seconds: float, measured_tflops: float | None, sheet_tflops: float | None) -> dict[str, Any]:
    """TFLOP/s, and its share of the peak measured in the same call and of the data sheet's."""
    tflops = flops / seconds / 1e12
    peaks = {"of_measured_matmul": measured_tflops, "of_data_sheet": sheet_tflops}
    return {"tflops_per_second": tflops, **{name: tflops / peak if peak else None for name, peak in peaks.items()}}


def data_sheet_tflops(gpu: str) -> float | None:
    """bf16 TFLOP/s by the name of a GPU, None where it is not in the table."""
    found = (peak for words, peak in DATA_SHEETS.items() if all(word in gpu for word in words.split()))
    return next(found, None)


def write_model(directory: Path, shape: Shape, dtype: str, device: str) -> None:
    """A model with random weights, and a tokenizer for which each letter is a token."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    settings: dict[str, Any] = {name: value for name, value in vars(shape).items() if name != "note"}
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = Qwen2Config(**settings, max_position_embeddings=4096, rms_norm_eps=1e-6)
    torch.manual_seed(0)
    with torch.device(device):  # normal numbers are slow to draw on a CPU
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
    # Byte-level, as transformers makes any Qwen2 tokenizer from its vocabulary whatever the file says; without merges
    # a letter is a token. The other tokens, which a random model draws, have texts of their own.
    vocab = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {END: len(vocab)} | {f"t{index}": index for index in range(len(vocab) + 1, shape.vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(directory)


# Rewards that differ within a group, so that every completion has a gradient.
REWARD = """import zlib

def coin(prompts, completions, references, **columns):
    return [float(zlib.crc32(completion.encode()) % 2) for completion in completions]
"""


def write_run(directory: Path, model: Path, sizes: Sizes) -> Path:
    """Synthetic prompts, expert answers, a reward and the configuration of a run; returns the last."""

    def letters(start: int, count: int) -> str:
        return "".join(chr(ord("a") + (start + place) % 26) for place in range(count))

    def write_rows(name: str, answer_tokens: int) -> Path:
        path = directory / name
        rows = (
            {"prompt": letters(row, sizes.prompt_tokens), "answer": letters(2 * row, answer_tokens)}
            for row in range(max(sizes.completions, sizes.experts))
        )
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    directory.mkdir(parents=True, exist_ok=True)
    reward = directory / "reward.py"
    reward.write_text(REWARD, encoding="utf-8")
    config = {
        "model": {"path": str(model), "dtype": sizes.dtype},
        "data": {"dataset": str(write_rows("prompts.jsonl", 1)), "prompt_format": "text"},
        "rewards": {"reward_funcs": [f"{reward}:coin"]},
        "rollout": {
            "num_generations": sizes.num_generations,
            "max_completion_length": sizes.completion_tokens,
        },
        "chord": {
            "chord_sft_dataset": str(write_rows("experts.jsonl", sizes.answer_tokens)),
            "chord_sft_global_batch_size": sizes.experts,
            "chord_mu_valley": 0.5,
        },
        "train": {
            "output_dir": str(directory / "run"),
            "global_batch_size": sizes.completions,
            "micro_batch_size": sizes.micro_batch_size,
            "train_iters": sizes.steps,
        },
        "tracking": {"report_to": []},
    }
    path = directory / "config.yaml"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML
    return path
