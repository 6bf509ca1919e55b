"""What is left out of the console: these very lines, and no others beside them."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

from chord_megatron.system.quiet import silence_vllm, silenced_environment

OF_TORCH = "`torch.distributed.reduce_op` is deprecated, please use `torch.distributed.ReduceOp` instead"


def warned(message: str, category: type[Warning], module: str) -> bool:
    """Whether a warning from there is shown."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        silence_vllm()
        warnings.warn_explicit(message, category, "file.py", 1, module)
    return bool(shown)


@pytest.mark.parametrize(
    ("message", "category", "module", "is_shown"),
    [
        (OF_TORCH, FutureWarning, "vllm.triton_utils.dispatcher", False),
        (OF_TORCH, FutureWarning, "my_rewards", True),
        (OF_TORCH, UserWarning, "vllm.triton_utils.dispatcher", True),
        ("`torch.foo` is deprecated", FutureWarning, "vllm.triton_utils.dispatcher", True),
    ],
)
def test_one_warning_of_one_module(message: str, category: type[Warning], module: str, is_shown: bool):
    assert warned(message, category, module) == is_shown


def test_one_line_of_one_logger(caplog: pytest.LogCaptureFixture):
    silence_vllm()
    logger = logging.getLogger("vllm.triton_utils.importing")
    logger.warning("Triton is installed, but doesn't include CPU backend. Disabling Triton.")
    logger.warning("Triton is installed, but `triton.backends` could not be imported. Disabling Triton.")
    logging.getLogger("other").warning("Triton is installed, but doesn't include CPU backend. Disabling Triton.")
    assert [(record.name, record.getMessage()[:34]) for record in caplog.records] == [
        ("vllm.triton_utils.importing", "Triton is installed, but `triton.b"),
        ("other", "Triton is installed, but doesn't i"),
    ]


def test_a_resource_tracker_is_silent_and_the_users_own_filters_hold(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error::FutureWarning")
    assert silenced_environment() == {
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning:multiprocessing.resource_tracker,error::FutureWarning"
    }
    monkeypatch.delenv("PYTHONWARNINGS")
    code = (
        "from multiprocessing import shared_memory as m, resource_tracker as t; import os; "
        "m.SharedMemory(create=True, size=8); t._resource_tracker._stop() if {stops} else os._exit(0)"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code.format(stops=True)], capture_output=True, text=True, env=environment
        ).stderr
        for environment in ({}, silenced_environment())
    ]
    assert ["leaked shared_memory" in output for output in outputs] == [True, False]
