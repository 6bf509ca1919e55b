"""Hugging Face directories out of a training engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from chord_megatron.system.atomic import failed_writes_named, replaced_directory
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.mapping import hf_tensors
from chord_megatron.weights.model_files import copy_model_files
from chord_megatron.weights.safetensors_writer import write_safetensors


class Exporter(Protocol):
    """The part of MegatronEngine that yields (HF name, full tensor) on every rank."""

    arch: ModelArchitecture

    def export_hf_weights(self) -> Iterator[tuple[str, Tensor]]: ...


@contextmanager
def exported_hf(engine: Exporter, source_dir: Path, target_dir: Path) -> Iterator[None]:
    """Write the current weights beside the configuration and tokenizer of `source_dir`. Collective.

    The directory appears, complete, at the end of the context, or not at all: what is written within is there first.
    It loads with `AutoModelForCausalLM.from_pretrained`.
    """
    weights = engine.export_hf_weights()
    if dist.get_rank() != 0:
        for _ in weights:  # takes part in the gathers
            pass
        yield
        return
    with failed_writes_named(target_dir), replaced_directory(target_dir) as partial:
        first = next(weights)  # the embedding, which has the dtype of the model
        write_safetensors(partial, hf_tensors(engine.arch, first[1].dtype), chain([first], weights))
        copy_model_files([source_dir], partial, engine.arch)
        yield
