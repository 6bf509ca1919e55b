"""Load the model that a run exported with transformers alone, and let it solve sums that it has never seen."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Print a few solutions and how many are right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--count", type=int, default=20)
    args = parser.parse_args()

    exports = sorted((args.run_dir / "hf").glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    if not exports:
        parser.error(f"{args.run_dir} has no hf/step_N; train first")
    model = AutoModelForCausalLM.from_pretrained(exports[-1])
    tokenizer = AutoTokenizer.from_pretrained(exports[-1])

    rng = random.Random()
    right = 0
    print(f"{exports[-1]}, loaded with transformers:")
    for number in range(args.count):
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": f"{a}+{b}"}], return_tensors="pt")[
            "input_ids"
        ]
        with torch.no_grad():
            output = model.generate(prompt, do_sample=False, max_new_tokens=40)
        answer = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        right += answer.endswith(f"#### {a + b}")
        if number < 5:
            print(f"  {a}+{b}= {answer}")
    print(f"{right} of {args.count} fresh sums solved")


if __name__ == "__main__":
    main()
