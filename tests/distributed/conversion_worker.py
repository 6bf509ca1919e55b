"""Loads each model under each layout of so many processes, and exports it again; rank 0 writes what differs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layouts import lay_out
from safetensors import safe_open
from torch import Tensor

from chord_megatron.backend.groups import shut_down_distributed
from chord_megatron.backend.hf_weights import export_hf_weights, load_hf_weights
from chord_megatron.backend.model import build_model_chunks
from chord_megatron.config import ModelConfig, ParallelConfig
from chord_megatron.weights.hf_config import read_architecture
from chord_megatron.weights.mapping import hf_tensors

BUCKET_BYTES = 16 * 1024  # several parameters in one, and several in a model


def main(questions: dict[str, Any], results: Path) -> None:
    findings = {}
    for layout, (settings, models) in questions["layouts"].items():
        parallel, groups = lay_out(settings)
        for name in models:
            path, dtype = questions["models"][name]
            findings[f"{layout}: {name}"] = round_trip(Path(path), dtype, parallel, groups)
    if groups.rank == 0:
        results.write_text(json.dumps(findings), encoding="utf-8")
    shut_down_distributed()


@torch.no_grad()
def round_trip(path: Path, dtype: str, parallel: ParallelConfig, groups: Any) -> str:
    """What is wrong with the exported tensors on any rank; empty if nothing is."""
    arch = read_architecture(path)
    chunks = build_model_chunks(arch, ModelConfig(path=str(path), dtype=dtype), parallel, groups)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.fill_(float("nan"))  # what is not loaded shows
    load_hf_weights(chunks, path, arch, groups)
    exported = list(export_hf_weights(chunks, arch, groups, BUCKET_BYTES))
    wrong = differences(exported, path, list(hf_tensors(arch, getattr(torch, dtype))))
    everywhere: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, wrong)
    return "; ".join(filter(None, everywhere))


def differences(exported: list[tuple[str, Tensor]], path: Path, order: list[str]) -> str:
    if [name for name, _ in exported] != order:
        return "other names, or in another order"
    with safe_open(path / "model.safetensors", framework="pt") as file:
        pairs = {name: (tensor, file.get_tensor(name)) for name, tensor in exported}
    return ", ".join(
        name for name, (ours, theirs) in pairs.items() if ours.dtype != theirs.dtype or not torch.equal(ours, theirs)
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
