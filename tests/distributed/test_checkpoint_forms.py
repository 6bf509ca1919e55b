"""Converted checkpoints load under any layout, and every form that Megatron-Core saves is converted back: bitwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import launch
from safetensors.torch import load_file
from tiny_families import EP_2, MODELS, PP_2, TP_2, VPP_2, WITH_EXPERTS

from chord_megatron.checkpoints import conversion
from chord_megatron.system.errors import UserError

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
TIED = "qwen2 tied"
NAMES = [*MODELS, TIED]
STACKED, BY_LAYER, BY_EXPERT = "stacked layers", "a key for each layer", "a key for each expert"
FORMS = {STACKED: {}, BY_LAYER: {"non_homogeneous_layers": True}, BY_EXPERT: {"singleton_local_shards": True}}
LAYOUTS: dict[str, tuple[dict, list[str], list[str]]] = {
    "TP 2": (TP_2, NAMES, list(FORMS)),
    "PP 2 x VPP 2": (PP_2 | VPP_2, NAMES, [STACKED]),
    # The first chunk is the embedding alone; the last layer is by itself.
    "PP 2 x VPP 2, uneven": (
        PP_2 | VPP_2 | {"pipeline_layout": [0, 2, 1, 1]},
        ["qwen3", TIED, "qwen3_moe", "deepseek_v3"],
        list(FORMS),
    ),
    "EP 2": (EP_2, [name for name in NAMES if name.startswith(WITH_EXPERTS)], [BY_EXPERT]),
}
SAVED = [(layout, form, name) for layout, (_, names, forms) in LAYOUTS.items() for form in forms for name in names]


@pytest.fixture(scope="module")
def models(tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    for name in NAMES:
        (root / name).symlink_to(tiny_models(name.split()[0], tied=name == TIED))
    return root


@pytest.fixture(scope="module")
def converted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    for name in NAMES:
        conversion.hf_to_megatron(models / name, root / name)
    return root


@pytest.fixture(scope="module")
def saved(models: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the worker saved, and findings.json of what it found."""
    root = tmp_path_factory.mktemp("saved")
    questions = {"hf": models, "converted": converted, "saved": root, "layouts": LAYOUTS, "forms": FORMS}
    (root / "questions.json").write_text(json.dumps(questions, default=str), encoding="utf-8")
    worker = HERE / "checkpoint_forms_worker.py"
    launch(worker, root / "questions.json", root / "findings.json", processes=2)
    return root


def test_every_checkpoint_loads_bitwise_under_every_layout(saved: Path):
    findings = json.loads((saved / "findings.json").read_text(encoding="utf-8"))
    assert len(findings) == len(SAVED) + sum(len(names) for _, names, _ in LAYOUTS.values())
    assert {case: wrong for case, wrong in findings.items() if wrong} == {}


def test_every_saved_form_converts_back_bitwise(saved: Path, models: Path, tmp_path: Path):
    for layout, form, name in SAVED:
        source, target = saved / f"{layout}, {form}" / name, tmp_path / f"{layout}, {form}, {name}"
        conversion.megatron_to_hf(source, target, hf_config=models / name)
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (target, models / name))
        assert ours.keys() == theirs.keys()
        wrong = [key for key in ours if ours[key].dtype != theirs[key].dtype or not torch.equal(ours[key], theirs[key])]
        assert wrong == [], (layout, form, name)


def test_converted_checkpoints_convert_back_bitwise(converted: Path, models: Path, tmp_path: Path):
    for name in NAMES:
        conversion.megatron_to_hf(converted / name, tmp_path / name)
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / name, models / name))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == [], name
        assert (tmp_path / name / "config.json").read_bytes() == (models / name / "config.json").read_bytes()


def test_another_models_config_is_refused_with_all_names(saved: Path, models: Path, tmp_path: Path):
    source = saved / "TP 2, stacked layers" / "qwen3"
    with pytest.raises(UserError) as error:
        conversion.megatron_to_hf(source, tmp_path / "out", hf_config=models / "qwen2")
    message = str(error.value)
    assert "missing decoder.layers.{0-3}.self_attention.linear_qkv.bias (4)" in message
    assert "unknown decoder.layers.self_attention.k_layernorm.weight, decoder.layers.self_attention.q_" in message
    assert "wrong shapes decoder.layers.self_attention.linear_qkv.weight [4, 128, 48] instead of [4, 96, 48]" in message
    assert not (tmp_path / "out").exists()
