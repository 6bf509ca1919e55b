"""The first import of Megatron-Core, which then changes nothing outside of itself, and its advice about CUDA."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Their kernels take CUDA tensors, and Megatron-Core takes the kernels wherever it can import them.
_PACKAGES_FOR_GPUS = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")
# For loggers of Megatron-Core's that nothing here uses: half a second, and folders that a killed process leaves behind.
# Hidden without CUDA alone, as all of this is: where there is a GPU, Megatron-Core is imported as it comes.
_PACKAGES_FOR_LOGS = ("wandb",)


def import_megatron_core() -> None:
    """Import Megatron-Core. Without CUDA nothing of it is compiled, now or when more of it is imported.

    As it is imported it compiles functions, for fusions that only GPUs have: a third of the time to start. Nor does it
    find packages for GPUs, in an image that has them, or wandb. With CUDA nothing is kept from it.
    """
    if torch.cuda.is_available():
        return
    with (
        warnings.catch_warnings(),
        _megatron_left_uncompiled(),
        _errors_only("torch.utils.cpp_extension"),
        _not_importable((*_PACKAGES_FOR_GPUS, *_PACKAGES_FOR_LOGS)),
    ):
        silence_cuda_advice()
        from megatron.core import jit

        jit.disable_jit_fuser()
        from megatron.core import optimizer  # noqa: F401 - warns as it is imported, like the next
        from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401


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


@contextmanager
def _not_importable(packages: Iterable[str]) -> Iterator[None]:
    """Within, as if these were not installed, unless they are imported already."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None: import raises ModuleNotFoundError
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
