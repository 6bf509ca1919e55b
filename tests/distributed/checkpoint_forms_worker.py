"""Loads converted checkpoints under each layout, and saves the models in each form that Megatron-Core has."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layouts import lay_out
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from chord_megatron.backend.groups import shut_down_distributed
from chord_megatron.backend.hf_weights import load_hf_weights, named_weights
from chord_megatron.backend.megatron_weights import load_megatron_weights
from chord_megatron.backend.model import build_model_chunks, unwrap
from chord_megatron.config import ModelConfig, ParallelConfig
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.hf_config import read_architecture

Chunks = list[torch.nn.Module]


def main(questions: dict[str, Any], results: Path) -> None:
    findings = {}
    for layout, (settings, models, forms) in questions["layouts"].items():
        parallel, groups = lay_out(settings)
        for name in models:
            hf, converted = (Path(folder) / name for folder in (questions["hf"], questions["converted"]))
            arch = read_architecture(hf)
            chunks, expected = (build(arch, parallel, groups) for _ in range(2))
            load_hf_weights(expected, hf, arch, groups)
            findings[f"{layout}: {name}, converted"] = load_and_compare(chunks, expected, converted, arch)
            for form in forms:
                directory = Path(questions["saved"]) / f"{layout}, {form}" / name
                save(expected, directory, questions["forms"][form])
                findings[f"{layout}: {name}, {form}"] = load_and_compare(chunks, expected, directory, arch)
    if groups.rank == 0:
        results.write_text(json.dumps(findings), encoding="utf-8")
    shut_down_distributed()


def build(arch: ModelArchitecture, parallel: ParallelConfig, groups: Any) -> Chunks:
    return build_model_chunks(arch, ModelConfig(path="none", dtype="float32"), parallel, groups)


@torch.no_grad()
def load_and_compare(chunks: Chunks, expected: Chunks, directory: Path, arch: ModelArchitecture) -> str:
    """The parameters that differ after loading, on any rank."""
    for _, tensor in named_weights(chunks):
        tensor.fill_(float("nan"))  # what is not loaded shows
    load_megatron_weights(chunks, directory, arch)
    pairs = zip(named_weights(chunks), named_weights(expected), strict=True)
    wrong = ", ".join(name for (name, ours), (_, theirs) in pairs if not torch.equal(ours, theirs))
    everywhere: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, wrong)
    return "; ".join(filter(None, everywhere))


def save(chunks: Chunks, directory: Path, metadata: dict[str, Any]) -> None:
    """As Megatron-LM does: with tensors and objects that are not the model's, and a command line in common.pt."""
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    state: dict[str, Any] = {
        f"model{i}": unwrap(chunk).sharded_state_dict(metadata=dict(metadata)) for i, chunk in enumerate(chunks)
    }
    replica = dist.get_rank()
    moment = torch.ones(3)
    state["optimizer"] = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.x", moment, replica_id=replica)
    for key in ("decoder.layers.unknown._extra_state", "rng_state"):
        state[key] = ShardedObject(key, {"any": "object"}, (1,), (0,), replica_id=replica)
    state["args"] = argparse.Namespace(num_layers=4)  # what torch.load(weights_only=True) refuses
    dist_checkpointing.save(state, str(directory))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
