"""Models by their names on the hub (`org/name`): fetched into the cache of huggingface_hub, and read there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from chord_megatron.config import Config
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import one_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_DESCRIPTION = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]  # of the model and its tokenizer: no code
_WEIGHTS = ["*.safetensors"]
# Folders hold other formats, and `consolidated` the same weights once more.
_IGNORED = ["*/*", "consolidated*"]


def with_local_model(config: Config, *, weights: bool = True) -> Config:
    """The configuration whose `model.path` is a folder: a name of the hub becomes that of its snapshot.

    weights: whether they are needed, too. huggingface_hub locks each file, so that the ranks of a node that ask at the
    same time fetch it once. Raises UserError where neither hub nor cache has the model.
    """
    name = config.model.path
    if not is_hub_name(name):
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(_fetch(name, weights))})})


def is_hub_name(path: str) -> bool:
    """Whether it looks like `org/name`, and nothing of that name lies in the working directory."""
    return _NAME.fullmatch(path) is not None and not os.path.lexists(path)


def _fetch(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download  # some tenths of a second

    wanted = _DESCRIPTION + (_WEIGHTS if weights else [])
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=_IGNORED))
    except Exception as error:  # of its own classes, of the client beneath it, of the disk
        raise UserError(
            f"model.path={name} is neither a folder (looked for at {Path(name).absolute()}) nor a model that the hub "
            f"or its cache gives ({type(error).__name__}: {one_line(error)}); give a folder, or see HF_TOKEN and "
            "HF_HUB_OFFLINE"
        ) from None
    if weights and not any(folder.glob("*.safetensors")):
        raise UserError(f"model.path={name} has no safetensors (looked for in {folder}); give a model that has them")
    return folder
