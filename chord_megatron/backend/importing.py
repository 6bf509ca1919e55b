"""The first import of Megatron-Core, which then changes nothing outside of itself, and its advice about CUDA."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def import_megatron_core() -> None:
    """Import Megatron-Core. Without CUDA nothing of it is compiled, now or when more of it is imported.

    As it is imported it compiles functions, for fusions that only GPUs have: a third of the time to start.
    """
    if torch.cuda.is_available():
        return
    with warnings.catch_warnings(), _megatron_left_uncompiled(), _errors_only("torch.utils.cpp_extension"):
        silence_cuda_advice()
        from megatron.core import jit

        jit.disable_jit_fuser()
        from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401 - warns as it is imported


def silence_cuda_advice() -> None:
    """Drop warnings about CUDA packages, CUDA settings and renamed functions: without CUDA nobody can follow them."""
    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", module=r"megatron\.core")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Of a logger: that one tells of a CUDA compiler without a GPU, when it is imported."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _megatron_left_uncompiled() -> Iterator[None]:
    compile_any = torch.compile

    def compile_others(model: Any = None, **options: Any) -> Any:
        if getattr(model, "__module__", "").startswith("megatron.core."):
            return model
        return compile_any(model, **options)

    torch.compile = compile_others
    try:
        yield
    finally:
        torch.compile = compile_any
