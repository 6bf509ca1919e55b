"""Checkpoints of Megatron-Core's own local layers, which name some norms otherwise, and ours read by these layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forked import launch
from safetensors.torch import load_file
from tiny_families import write_model

from chord_megatron.checkpoints import conversion
from chord_megatron.checkpoints.reader import MegatronReader
from chord_megatron.weights.hf_config import read_architecture

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
DENSE = ["llama", "qwen2", "qwen3"]
# Their norm before experts is stored under another name than TransformerEngine's, and so than ours.
OTHERS = ["qwen3_moe", "qwen3_moe-mixed", "mixtral", "deepseek_v3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("upstream")
    found = {kind: root / kind for kind in ("hf", "converted", "saved")}
    for name in DENSE + OTHERS:
        write_model(found["hf"] / name, name)
        conversion.hf_to_megatron(found["hf"] / name, found["converted"] / name)
    questions = {"models": DENSE + OTHERS, "loaded by theirs": DENSE, **found}
    (root / "questions.json").write_text(json.dumps(questions, default=str), encoding="utf-8")
    launch(HERE / "upstream_layers_worker.py", root / "questions.json", root / "findings.json", processes=1)
    return found | {"findings": root / "findings.json"}


def test_weights_pass_bitwise_both_ways(folders: dict[str, Path]):
    findings = json.loads(folders["findings"].read_text(encoding="utf-8"))
    assert len(findings) == len(DENSE + OTHERS) + len(DENSE)
    assert {case: wrong for case, wrong in findings.items() if wrong} == {}


@pytest.mark.parametrize("name", DENSE + OTHERS)
def test_what_they_save_converts_bitwise(folders: dict[str, Path], tmp_path: Path, name: str):
    conversion.megatron_to_hf(folders["saved"] / name, tmp_path / "out", hf_config=folders["hf"] / name)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", folders["hf"] / name))
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("mixtral", {"decoder.layers.pre_mlp_layernorm.weight": "decoder.layers.mlp.linear_fc1.layer_norm_weight"}),
        (
            "qwen3_moe-mixed",  # its third layer is dense, so that each has keys of its own
            {
                f"decoder.layers.{layer}.pre_mlp_layernorm.weight": (
                    f"decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight"
                )
                for layer in (0, 1, 3)
            },
        ),
    ],
)
def test_which_keys_are_named_otherwise(folders: dict[str, Path], name: str, renamed: dict[str, str]):
    reader = MegatronReader(folders["saved"] / name, read_architecture(folders["hf"] / name))
    assert reader.renamed == renamed
