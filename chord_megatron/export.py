"""Hugging Face directories out of a training engine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from chord_megatron.convert.safetensors_io import write_safetensors

# What a model directory holds beside its weights; copied so that the export loads by itself.
_COPIED = (
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


class Exporter(Protocol):
    """The part of MegatronEngine that yields (HF name, full tensor) on every rank."""

    def export_hf_weights(self) -> Iterable[tuple[str, Tensor]]: ...


def export_hf(engine: Exporter, source_dir: Path, target_dir: Path) -> None:
    """Write the current weights beside the configuration and tokenizer of `source_dir`. Collective.

    The directory appears complete or not at all; it loads with `AutoModelForCausalLM.from_pretrained`.
    """
    weights = engine.export_hf_weights()
    if dist.get_rank() != 0:
        for _ in weights:  # takes part in the gathers
            pass
        return
    partial = target_dir.with_name(target_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_safetensors(partial, weights)
    for name in _COPIED:
        if (source_dir / name).is_file():
            shutil.copy2(source_dir / name, partial / name)
    shutil.rmtree(target_dir, ignore_errors=True)
    os.replace(partial, target_dir)
