"""Ask a model, with transformers alone.

python examples/smollm2/chat.py runs/smollm2/run/hf/step_20 "Ann has 12 eggs and buys 7 more. How many are there?"
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """One answer to each question; without one, those that are typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("questions", nargs="*")
    arguments = parser.parse_args()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(arguments.model),
        AutoTokenizer.from_pretrained(arguments.model),
    )
    for question in arguments.questions or iter(lambda: input("> "), ""):
        turn = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**prompt, do_sample=False, max_new_tokens=100)
        print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
