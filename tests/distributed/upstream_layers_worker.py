"""Models of Megatron-Core's own local layers, as Megatron-LM builds them: what they save, what they load of ours."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from chord_megatron.backend.acceleration import Acceleration
from chord_megatron.backend.attention import SDPACoreAttention
from chord_megatron.backend.groups import initialize_distributed, shut_down_distributed
from chord_megatron.backend.hf_weights import load_hf_weights, named_weights
from chord_megatron.backend.megatron_weights import load_megatron_weights
from chord_megatron.backend.model import build_model_chunks
from chord_megatron.backend.transformer_config import transformer_config
from chord_megatron.config import ModelConfig, ParallelConfig
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.hf_config import read_architecture
from chord_megatron.weights.mapping import padded_vocab_size
from chord_megatron.weights.safetensors_io import SafetensorsReader
from chord_megatron.weights.shards import import_parameter

MODEL = ModelConfig(path="none", dtype="float32")


def main(questions: dict[str, Any], results: Path) -> None:
    parallel = ParallelConfig()
    groups = initialize_distributed(parallel, seed=0)
    findings = {}
    for name in questions["models"]:
        hf, converted, saved = (Path(questions[kind]) / name for kind in ("hf", "converted", "saved"))
        arch = read_architecture(hf)
        theirs = build_upstream(arch, parallel)
        fill(theirs, hf, arch)
        save(theirs, saved)
        ours, expected = (build_model_chunks(arch, MODEL, parallel, groups) for _ in range(2))
        load_hf_weights(expected, hf, arch, groups)
        clear(ours[0])
        load_megatron_weights(ours, saved, arch)
        findings[f"{name}: theirs into ours"] = different(named_weights(ours), named_weights(expected))
        if name in questions["loaded by theirs"]:
            weights = {key: value.clone() for key, value in tensors(theirs)}
            clear(theirs)
            load(theirs, converted)
            findings[f"{name}: ours into theirs"] = different(tensors(theirs), weights.items())
    results.write_text(json.dumps(findings), encoding="utf-8")
    shut_down_distributed()


def build_upstream(
    arch: ModelArchitecture, parallel: ParallelConfig, layers: Literal["transformer_engine", "local"] = "local"
) -> GPTModel:
    config = transformer_config(arch, MODEL, parallel, Acceleration(layers, False, False))
    if arch.moe and not arch.moe.dense_layers:
        config.moe_layer_freq = 1  # as Megatron-LM says it by default: layers are then stored together
    on_te = layers == "transformer_engine"
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=on_te, normalization="RMSNorm")
    if arch.mla and not on_te:  # 0.16's DotProductAttention takes no keys and values of different sizes
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(arch.vocab_size, 1),
        max_sequence_length=arch.max_position_embeddings,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=arch.tie_word_embeddings,
    )


def tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("expert_bias")]
    return [*model.named_parameters(), *biases]


@torch.no_grad()
def fill(model: GPTModel, hf: Path, arch: ModelArchitecture) -> None:
    with SafetensorsReader(hf) as reader:
        for name, tensor in tensors(model):
            rows = padded_vocab_size(arch.vocab_size, 1)
            value = import_parameter(name, arch, reader.get_slice, tp_rank=0, tp_size=1, padded_vocab_size=rows)
            tensor.copy_(value)


@torch.no_grad()
def clear(model: torch.nn.Module) -> None:
    """What is not loaded shows."""
    for _, tensor in tensors(model):
        tensor.fill_(float("nan"))


def save(model: GPTModel, directory: Path) -> None:
    directory.mkdir(parents=True)
    state = {"model": model.sharded_state_dict(metadata={}), "args": argparse.Namespace(num_layers=4)}
    dist_checkpointing.save(state, str(directory))


def load(model: GPTModel, directory: Path) -> None:
    """With `--dist-ckpt-strictness log_all`, and the metadata that the checkpoint has of its own form."""
    metadata = dist_checkpointing.load_content_metadata(str(directory))
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    loaded = dist_checkpointing.load(state, str(directory), strict="log_all")
    model.load_state_dict(loaded["model"], strict=False)


def different(ours: Any, theirs: Any) -> list[str]:
    return [a for (a, x), (b, y) in zip(ours, theirs, strict=True) if a != b or not torch.equal(x, y)]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
