"""Whether the output layer is the embedding: what the bytes say, where config.json and the weights disagree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from chord_megatron.checkpoints.conversion import hf_to_megatron, megatron_to_hf
from chord_megatron.rollout.vllm_adapter import engine_arguments
from chord_megatron.weights.hf_config import read_architecture
from chord_megatron.weights.model_files import copy_model_files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Weights = dict[str, Tensor]


def with_last_number_changed(weight: Tensor) -> Tensor:
    changed = weight.clone()
    changed[-1, -1] += 1
    return changed


# What is written to the weights of a tied model -> whether it is tied.
HEADS: dict[str, tuple[Callable[[Weights], Weights], bool]] = {
    "no head": (lambda weights: {}, True),
    "the same bytes": (lambda weights: {HEAD: weights[EMBEDDING].clone()}, True),
    "other bytes": (lambda weights: {HEAD: weights[EMBEDDING].flip(0)}, False),
    "the last number differs": (lambda weights: {HEAD: with_last_number_changed(weights[EMBEDDING])}, False),
    "the same numbers in another dtype": (lambda weights: {HEAD: weights[EMBEDDING].double()}, True),
    "other numbers in another dtype": (lambda weights: {HEAD: weights[EMBEDDING].bfloat16()}, False),
    "another shape": (lambda weights: {HEAD: weights[EMBEDDING][:-1].clone()}, False),
}


def write_tied(folder: Path, model: Path, head: Callable[[Weights], Weights], *, sharded: bool = False) -> Path:
    """A copy of a tied model with what `head` adds to its weights, in a second file where `sharded`."""
    folder.mkdir()
    weights = load_file(model / "model.safetensors")
    extra = {name: tensor.contiguous() for name, tensor in head(weights).items()}
    copy_config(model, folder)
    if not sharded:
        save_file({**weights, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {"model-00001-of-00002.safetensors": weights, "model-00002-of-00002.safetensors": extra}
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def copy_config(model: Path, folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("head", HEADS)
def test_a_head_of_other_numbers_is_not_tied(
    tmp_path: Path, tiny_models: Callable[..., Path], head: str, sharded: bool
) -> None:
    added, is_tied = HEADS[head]
    folder = write_tied(tmp_path / "model", tiny_models("qwen2", tied=True), added, sharded=sharded)
    assert read_architecture(folder).tie_word_embeddings is is_tied


def test_a_large_head_is_compared_to_its_end(tmp_path: Path, tiny_models: Callable[..., Path]) -> None:
    """Tensors are read in parts: the last row of many decides as the first does."""
    folder = write_tied(tmp_path / "model", tiny_models("qwen2", tied=True), HEADS["no head"][0])
    embedding = torch.randn(300_000, 48)
    for head, is_tied in ((embedding.clone(), True), (with_last_number_changed(embedding), False)):
        save_file({EMBEDDING: embedding, HEAD: head}, folder / "model.safetensors")
        assert read_architecture(folder).tie_word_embeddings is is_tied


@pytest.mark.parametrize("damage", ["no weights", "cut off"])
def test_weights_that_cannot_be_read_decide_nothing(
    tmp_path: Path, tiny_models: Callable[..., Path], damage: str
) -> None:
    """Whoever reads them says what is wrong with them."""
    folder = write_tied(tmp_path / "model", tiny_models("qwen2", tied=True), HEADS["other bytes"][0])
    weights = folder / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    assert read_architecture(folder).tie_word_embeddings


def test_conversion_keeps_the_head_and_says_so(tmp_path: Path, tiny_models: Callable[..., Path]) -> None:
    source = tiny_models("qwen2", said_tied=True)
    hf_to_megatron(source, tmp_path / "megatron", verify=True)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", verify=True)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf2", hf_config=source, verify=True)
    wanted = load_file(source / "model.safetensors")
    tokens = torch.arange(20)[None]
    logits = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
    for folder in (tmp_path / "hf", tmp_path / "hf2"):
        found = load_file(folder / "model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert AutoModelForCausalLM.from_pretrained(folder)(tokens).logits.equal(logits)
    for folder in (tmp_path / "megatron", tmp_path / "hf", tmp_path / "hf2"):
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(("said_tied", "written"), [(True, False), (False, False)])
def test_a_copied_config_says_what_is_true_of_the_weights(
    tmp_path: Path, tiny_models: Callable[..., Path], said_tied: bool, written: bool
) -> None:
    source = tiny_models("qwen2", said_tied=said_tied)
    copy_model_files([source], tmp_path, read_architecture(source))
    copied, config = ((folder / "config.json").read_text() for folder in (tmp_path, source))
    assert json.loads(copied) == json.loads(config) | {"tie_word_embeddings": written}
    assert (copied == config) is not said_tied  # untouched where it is true already


def test_vllm_is_told_what_the_weights_say(tiny_models: Callable[..., Path]) -> None:
    """It goes by config.json alone, and would leave the head out."""
    arguments = engine_arguments(
        tiny_models("qwen2", said_tied=True), dtype="float32", max_model_len=16, max_num_seqs=1
    )
    assert arguments["hf_overrides"] == {"tie_word_embeddings": False}
