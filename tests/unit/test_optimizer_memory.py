"""The optimizer's memory: what goes together, what a machine must have, and how Megatron-Core is told."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from test_estimate import config_of

from chord_megatron.backend.acceleration import Installed
from chord_megatron.backend.optimizer import _optimizer_config, check_optimizer_here, drop_hybrid_settings
from chord_megatron.config import ModelConfig, OptimizerConfig
from chord_megatron.planning.megatron import asks_megatron
from chord_megatron.planning.optimizer import check_optimizer
from chord_megatron.system.errors import UserError

DISTRIBUTED = {"optimizer__use_distributed_optimizer": True}
AWARE = {**DISTRIBUTED, "optimizer__use_precision_aware_optimizer": True}
OFFLOADED = {**DISTRIBUTED, "optimizer__optimizer_cpu_offload": True}

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"optimizer__optimizer_cpu_offload": True},
        "optimizer.optimizer_cpu_offload needs optimizer.use_distributed_optimizer=true; set it",
    ),
    (
        {"optimizer__use_precision_aware_optimizer": True},
        "optimizer.use_precision_aware_optimizer needs optimizer.use_distributed_optimizer=true; set it",
    ),
    (
        {**OFFLOADED, "model__dtype": "float32"},
        "optimizer.optimizer_cpu_offload is for model.dtype=bfloat16; set that, or "
        "optimizer.optimizer_cpu_offload=false",
    ),
    (
        {**DISTRIBUTED, "optimizer__exp_avg_dtype": "fp8"},
        "optimizer.exp_avg_dtype=fp8 needs optimizer.use_precision_aware_optimizer=true; set it",
    ),
    (
        {**OFFLOADED, "optimizer__main_grads_dtype": "bfloat16"},
        "optimizer.main_grads_dtype=bfloat16 needs optimizer.use_precision_aware_optimizer=true; set it",
    ),
    (
        {**AWARE, **OFFLOADED, "optimizer__exp_avg_sq_dtype": "bfloat16"},
        "optimizer.exp_avg_sq_dtype=bfloat16, but optimizer.optimizer_cpu_offload has the states in float32; set one "
        "of them back",
    ),
    (
        {**DISTRIBUTED, "optimizer__optimizer_offload_fraction": 0.5},
        "optimizer.optimizer_offload_fraction=0.5 is for optimizer.optimizer_cpu_offload=true; set that, or remove it",
    ),
    (
        {**AWARE, "optimizer__exp_avg_dtype": "fp8", "rollout__offload_optimizer": True},
        "optimizer.exp_avg_dtype=fp8 cannot leave the GPU as rollout.offload_optimizer=true wants it; set one of them "
        "back",
    ),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], sentence: str):
    with pytest.raises(UserError) as error:
        check_optimizer(config_of(**settings))
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "settings",
    [
        {},
        DISTRIBUTED,
        {**AWARE, "optimizer__main_grads_dtype": "bfloat16", "optimizer__exp_avg_dtype": "fp8"},
        {**OFFLOADED, "optimizer__optimizer_offload_fraction": 0.5},
        {**AWARE, **OFFLOADED, "optimizer__main_grads_dtype": "bfloat16"},
    ],
)
def test_what_goes_together_passes_and_megatron_is_asked_where_it_has_a_say(settings: dict[str, Any]):
    config = config_of(**settings)
    check_optimizer(config)
    assert asks_megatron(config) == (settings not in ({}, DISTRIBUTED))


@pytest.mark.parametrize(
    ("settings", "cuda", "adam", "sentence"),
    [
        ({}, False, "torch", None),
        (
            {"optimizer_cpu_offload": True},
            False,
            "torch",
            "optimizer.optimizer_cpu_offload needs a GPU to offload from, which this machine lacks; set it to false",
        ),
        (
            {"optimizer_cpu_offload": True},
            True,
            "Apex",
            "optimizer.optimizer_cpu_offload needs TransformerEngine's Adam on a GPU, which this machine lacks; set it "
            "to false",
        ),
        (
            {"use_precision_aware_optimizer": True},
            True,
            "torch",
            "optimizer.use_precision_aware_optimizer needs TransformerEngine's Adam on a GPU, which this machine "
            "lacks; set it to false",
        ),
        ({"optimizer_cpu_offload": True}, True, "TransformerEngine", None),
        ({"use_precision_aware_optimizer": True}, True, "TransformerEngine", None),
    ],
)
def test_a_machine_must_have_it(settings: dict[str, Any], cuda: bool, adam: str, sentence: str | None):
    installed = Installed(cuda=cuda, transformer_engine=True, fused_weight_gradient=False, adam=adam)
    if sentence is None:
        check_optimizer_here(OptimizerConfig(**settings), installed)
        return
    with pytest.raises(UserError) as error:
        check_optimizer_here(OptimizerConfig(**settings), installed)
    assert str(error.value) == sentence


def test_megatron_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        sys.modules["megatron.core.optimizer.optimizer_config"], "is_te_min_version", lambda version: True
    )
    settings = OptimizerConfig(
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=True,
        optimizer_cpu_offload=True,
        optimizer_offload_fraction=0.25,
        main_grads_dtype="bfloat16",
        main_params_dtype="float16",
        exp_avg_dtype="bfloat16",
        exp_avg_sq_dtype="fp8",
    )
    told = _optimizer_config(settings, ModelConfig(path="m"))
    assert (told.optimizer_cpu_offload, told.optimizer_offload_fraction) == (True, 0.25)
    assert told.use_precision_aware_optimizer and not told.store_param_remainders
    assert (told.main_grads_dtype, told.main_params_dtype) == (torch.bfloat16, torch.float16)
    assert (told.exp_avg_dtype, told.exp_avg_sq_dtype) == (torch.bfloat16, torch.uint8)
    plain = _optimizer_config(OptimizerConfig(use_distributed_optimizer=True), ModelConfig(path="m"))
    assert not plain.use_precision_aware_optimizer and not plain.optimizer_cpu_offload


def test_offloading_is_precision_aware_for_megatron(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        sys.modules["megatron.core.optimizer.optimizer_config"], "is_te_min_version", lambda version: True
    )
    settings = OptimizerConfig(use_distributed_optimizer=True, optimizer_cpu_offload=True)
    assert _optimizer_config(settings, ModelConfig(path="m")).use_precision_aware_optimizer


def test_a_checkpoint_holds_no_classes_of_optimizers():
    group = {"lr": 1.0, "cpu_optimizer_cls": torch.optim.AdamW, "offload_fraction": 1.0, "fused": True}
    state = {0: {"optimizer": {"param_groups": [{**group}]}}, "param_groups": [{**group}], "other": [group]}
    drop_hybrid_settings(state)
    kept = {"lr": 1.0, "fused": True}
    assert state == {0: {"optimizer": {"param_groups": [kept]}}, "param_groups": [kept], "other": [group]}
