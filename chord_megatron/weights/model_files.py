"""What a model folder holds beside its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_DTYPE_KEYS = ("dtype", "torch_dtype")  # of transformers 5 and 4


def copy_model_files(sources: Iterable[Path], target: Path) -> None:
    """Copy configuration, tokenizer and generation settings, each from the first folder that has it."""
    folders = list(sources)
    for name in _FILES:
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is not None:
            shutil.copy2(found, target / name)


def set_config_dtype(model_dir: Path, dtype: torch.dtype) -> None:
    """Let config.json name the dtype of the weights: transformers loads them in it."""
    path = model_dir / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in _DTYPE_KEYS if key in config] or ["torch_dtype"]
    if any(config.get(key) != name for key in keys):
        config.update(dict.fromkeys(keys, name))
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
