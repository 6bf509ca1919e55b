"""Make the quickstart: a tiny Qwen3 model with random weights, its tokenizer, and an addition task.

A prompt is `347+585`, an expert answer is the sum worked column by column from the right,
`750=12 481=13 351=9 #### 932` (digit, digit and carry = their sum), and the reference is `932`.
Everything depends on `--seed` only; running the script again writes the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

NUM_DIGITS = 3
NUM_EXPERTS, NUM_PROMPTS, NUM_EVAL = 4000, 4000, 128

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
VOCABULARY = [PAD, END, UNKNOWN, "####", *"0123456789+= "]
# "347+585" becomes "347+585=", and the answer follows it without a space.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '=' }}{% endfor %}"
)

Problem = tuple[int, int]


def sample_problems(rng: random.Random, count: int) -> list[Problem]:
    """`count` different pairs of numbers with NUM_DIGITS digits each."""
    low, high = 10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS
    codes = rng.sample(range((high - low) ** 2), count)
    return [(low + code // (high - low), low + code % (high - low)) for code in codes]


def worked_solution(a: int, b: int) -> str:
    """The addition as taught at school: digit, digit, carry = sum for each column, then the result."""
    columns, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        total = int(x) + int(y) + carry
        columns.append(f"{x}{y}{carry}={total}")
        carry = total // 10
    return f"{' '.join(columns)} #### {a + b}"


def prompt_rows(problems: Iterable[Problem]) -> Iterator[dict[str, str]]:
    """Rows whose answer is the number to compare with."""
    return ({"prompt": f"{a}+{b}", "answer": str(a + b)} for a, b in problems)


def expert_rows(problems: Iterable[Problem]) -> Iterator[dict[str, str]]:
    """Rows whose answer is the text to imitate."""
    return ({"prompt": f"{a}+{b}", "answer": worked_solution(a, b)} for a, b in problems)


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build_tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """One token a character, and one for "####"; decoding gives back the text exactly."""
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("####|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A random model that tensor parallel 2 and pipeline parallel 2 or 4 divide evenly."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,  # more ranks than this cannot share the keys and values
        head_dim=32,
        max_position_embeddings=64,
        rope_theta=1000.0,  # short sequences: position matters at the scale of tens of tokens
        initializer_range=0.05,  # narrow layers learn in half the steps that the usual 0.02 takes
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        # No pad_token_id: transformers would make its embedding exactly zero, and a zero vector that a rollout
        # happens to sample has a huge gradient through RMSNorm.
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config).float()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def main() -> None:
    """Write model/, prompts.jsonl, experts.jsonl and eval.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart/assets"))
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the problems")
    args = parser.parse_args()

    args.output_dir.mkdir(parents=True, exist_ok=True)
    problems = sample_problems(random.Random(args.seed), NUM_EXPERTS + NUM_PROMPTS + NUM_EVAL)
    experts, rest = problems[:NUM_EXPERTS], problems[NUM_EXPERTS:]
    write_jsonl(args.output_dir / "experts.jsonl", expert_rows(experts))
    write_jsonl(args.output_dir / "prompts.jsonl", prompt_rows(rest[:NUM_PROMPTS]))
    write_jsonl(args.output_dir / "eval.jsonl", prompt_rows(rest[NUM_PROMPTS:]))

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(args.output_dir / "model")
    tokenizer.save_pretrained(args.output_dir / "model")
    print(f"wrote the model and {len(problems)} problems to {args.output_dir}")


if __name__ == "__main__":
    main()
