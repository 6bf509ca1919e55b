"""What a model folder holds beside its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from chord_megatron.weights.architecture import ModelArchitecture

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


def copy_model_files(sources: Iterable[Path], target: Path, arch: ModelArchitecture) -> None:
    """Copy configuration, tokenizer and generation settings, each from the first folder that has it.

    The copied config.json says whether the model is tied, where that of the source is wrong.
    """
    folders = list(sources)
    for name in _FILES:
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is not None:
            shutil.copy2(found, target / name)
    if (target / "config.json").is_file():
        _update_config(target, ("tie_word_embeddings",), arch.tie_word_embeddings)


def set_config_dtype(model_dir: Path, dtype: torch.dtype) -> None:
    """Let config.json name the dtype of the weights: transformers loads them in it."""
    _update_config(model_dir, _DTYPE_KEYS, str(dtype).removeprefix("torch."))


def _update_config(model_dir: Path, keys: tuple[str, ...], value: str | bool) -> None:
    """Write the value under those of the keys that config.json has, the last one if none, where it says another."""
    path = model_dir / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    keys = tuple(key for key in keys if key in config) or keys[-1:]
    if any(config.get(key, False) != value for key in keys):
        config.update(dict.fromkeys(keys, value))
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
