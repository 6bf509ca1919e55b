"""Which kernels and overlaps a run uses: decided from what is installed, each with a fallback in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from megatron.core import optimizer
from megatron.core.tensor_parallel import layers

_ADAMS = {"transformer_engine": "TransformerEngine", "apex": "Apex", "torch": "torch"}


@dataclass(frozen=True)
class Installed:
    """What the decision rests on."""

    cuda: bool
    transformer_engine: bool
    fused_weight_gradient: bool  # Apex's extension, without which Megatron-Core's own linear layers refuse the fusion
    adam: str  # where Megatron-Core has found one: TransformerEngine, Apex or torch


@dataclass(frozen=True)
class Acceleration:
    """What is used."""

    transformer_impl: Literal["transformer_engine", "local"]  # Megatron-Core's name for the kind of layers
    fuse_gradient_accumulation: bool  # weight gradients are added to the float32 sums by their matrix multiplication
    overlap_grad_reduce: bool  # gradients are summed over data-parallel ranks while others are computed
    share_prompts: bool = True  # the attention takes a prompt that several sequences begin with


def find_installed() -> Installed:
    """The facts about this process."""
    return Installed(
        cuda=torch.cuda.is_available(),
        transformer_engine=find_spec("transformer_engine") is not None,
        fused_weight_gradient=layers._grad_accum_fusion_available,  # noqa: SLF001 - what its own linear layers ask
        adam=_ADAMS[optimizer.Adam.__module__.split(".")[0]],
    )


def choose_acceleration(
    installed: Installed,
    *,
    data_parallel_size: int = 1,
    context_parallel_size: int = 1,
    overlap_grad_reduce: bool | None = None,
) -> Acceleration:
    """data_parallel_size: of ranks with gradients of their own, context-parallel ones, too.

    overlap_grad_reduce: the user's decision, None = on CUDA. Without other data-parallel ranks there is none.

    Parameters are never gathered while the next forward pass runs: that pass would wait for a layer's parameters
    when the layer is called, but the head reads its weight, and sampling and saving read all of them, without that.
    """
    wants_overlap = installed.cuda if overlap_grad_reduce is None else overlap_grad_reduce
    on_te = installed.cuda and installed.transformer_engine
    return Acceleration(
        transformer_impl="transformer_engine" if on_te else "local",
        fuse_gradient_accumulation=installed.cuda and installed.fused_weight_gradient,
        overlap_grad_reduce=wants_overlap and data_parallel_size > 1,
        share_prompts=not on_te and context_parallel_size == 1,
    )


def describe(chosen: Acceleration, installed: Installed) -> str:
    """One line for the log."""
    missing = "not installed" if installed.cuda else "needs a GPU"
    kind = "TransformerEngine"
    if chosen.transformer_impl == "local":
        kind = f"Megatron local (TransformerEngine {missing})"
    fusion = "fused" if chosen.fuse_gradient_accumulation else f"unfused (Apex's kernel {missing})"
    overlap = "overlapped" if chosen.overlap_grad_reduce else "not overlapped"
    return f"layers: {kind}, Adam: {installed.adam}, gradient accumulation: {fusion}, gradient reduction: {overlap}"
