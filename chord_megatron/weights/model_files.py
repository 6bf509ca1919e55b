"""What a model folder holds beside its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import torch

from chord_megatron.weights.architecture import ModelArchitecture

_TEMPLATES = "additional_chat_templates"  # the one folder that transformers looks for a tokenizer's files in
# What stays: states, documents, pictures. A tokenizer with code of its own may need a file of any other name.
_PATTERNS = (
    ".*",
    "README*",
    "*.index.json",
    "metadata.json",
    "state.json",
    "trainer_state.json",
    "latest_checkpointed_iteration.txt",
)
_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".ggml", ".nemo"),
    *(".onnx", ".onnx_data", ".msgpack", ".h5", ".npy", ".npz"),
    *(".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".mp4", ".ipynb"),
    *(".zip", ".tar", ".gz", ".parquet", ".arrow", ".jsonl", ".log"),
}
MAX_BYTES = 512 * 2**20  # many times the largest vocabulary
_DTYPE_KEYS = ("dtype", "torch_dtype")  # of transformers 5 and 4


def copy_model_files(sources: Iterable[Path], target: Path, arch: ModelArchitecture) -> list[str]:
    """Copy configuration, tokenizer and generation settings: all but weights, each file from the first that has it.

    What `target` has already stays. The copied config.json says whether the model is tied, where the source is wrong.
    Returns a sentence on each file that is not copied (`links_out_of`).
    """
    left_out: list[str] = []
    for folder in sources:
        for name in _names(folder):
            if (target / name).exists():
                continue
            if not _is_of_model(folder, name):
                left_out.append(_left_out(folder / name))
                continue
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target / name)  # and not its mode: it may be read-only
    if (target / "config.json").is_file():
        _update_config(target, ("tie_word_embeddings",), arch.tie_word_embeddings)
    return left_out


def links_out_of(model_dir: Path) -> list[str]:
    """A sentence on each file that is not copied because it is a link out of the model's folder."""
    return [_left_out(model_dir / name) for name in _names(model_dir) if not _is_of_model(model_dir, name)]


def _left_out(link: Path) -> str:
    return f"{link} is a link to {link.resolve()}, outside of the model's folder: not copied"


def _is_of_model(folder: Path, name: str) -> bool:
    """Whether a file is, behind its links, in the model's folder, or in the one that config.json links to.

    That is `blobs` in the cache of huggingface_hub, whose snapshots are links, and the true folder of one made of
    links. A link to anywhere else, which a Git repository may hold, would publish a file of whoever converts.
    """
    homes = {folder.resolve(), (folder / "config.json").resolve().parent}
    return any((folder / name).resolve().is_relative_to(home) for home in homes)


def _names(folder: Path) -> list[str]:
    """The files that travel, relative to the folder; what a link points to counts as a file, but not as a folder."""
    templates = folder / _TEMPLATES
    files = [*folder.iterdir(), *([] if templates.is_symlink() else templates.glob("*.jinja"))]
    return sorted(
        str(file.relative_to(folder))
        for file in files
        if file.is_file()
        and file.stat().st_size <= MAX_BYTES
        and file.suffix not in _SUFFIXES
        and not any(fnmatch(file.name, pattern) for pattern in _PATTERNS)
    )


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
