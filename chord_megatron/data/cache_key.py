"""Where the samples of a large data set are kept: a folder by everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chord_megatron.data.files import Rows

FEWEST_ROWS = 16384  # of a large data set; fewer are made by each process for itself, which takes seconds
_LIBRARIES = ("transformers", "tokenizers", "jinja2")  # that make tokens of messages


def content_of(rows: Rows) -> str | None:
    """What tells the rows of a source from others; None of rows that are in memory anyway."""
    # A `datasets` data set knows its files by their paths, sizes and times, or by the hub's tags.
    content: str | None = getattr(rows, "content", None) or getattr(rows, "_fingerprint", None)
    return content


def cache_folder(content: str, tokenizer: Any, settings: Any) -> Path:
    """Under the folder of `datasets`, which HF_HOME and HF_DATASETS_CACHE move.

    settings: what the samples depend on beside the rows and the tokenizer, as plain JSON values.
    """
    import datasets

    depends_on = [content, _tokenizer_digest(tokenizer), settings, _code_digest(), [*map(version, _LIBRARIES)]]
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / "chord_megatron" / key[:32]


def _tokenizer_digest(tokenizer: Any) -> str:
    """Of all that it would save: vocabulary, template, special tokens, code of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _files_digest(Path(folder), "*")


def _code_digest() -> str:
    """Of what makes samples of rows: a release that reads them in another way takes nothing from an earlier one."""
    return _files_digest(Path(__file__).parent, "*.py")


def _files_digest(folder: Path, pattern: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob(pattern) if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()
