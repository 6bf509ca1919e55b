"""Makes Megatron-Core run without CUDA, by one explicit call before models are built.

Megatron-Core names CUDA in three ways, and each gets the smallest replacement there is:

1. the constants "cuda" and "torch.cuda.FloatTensor" inside functions: the constant is rewritten in the
   function's code object, in the listed modules only, so nothing is intercepted at run time;
2. calls such as `torch.cuda.current_device()` and `Tensor.cuda()`, which can only fail where there is no CUDA;
3. behaviour that differs: the random state of "the device", and checkpoint helper processes.
"""

# ruff: noqa: SLF001 - what is replaced here has no public name

from __future__ import annotations

import contextlib
import importlib
import queue
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from chord_megatron.backend.releases import recompute_in_plain_torch, tell_that_transformer_engine_is_missing

_MODULES_NAMING_CUDA = (
    "megatron.core.pipeline_parallel.schedules",  # total_num_tokens of each schedule
    "megatron.core.optimizer.optimizer",  # overflow buffers, dtypes of parameters
    "megatron.core.optimizer.distrib_optimizer",  # _build_model_and_main_param_groups: dtypes
    "megatron.core.optimizer.clip_grads",  # get_grad_norm_fp32; clip_grad_by_total_norm_fp32: dtype of the gradient
    "megatron.core.distributed.param_and_grad_buffer",  # _ParamAndGradBuffer: a tensor to warm up
    "megatron.core.utils",  # local_multi_tensor_l2_norm
    "megatron.core.transformer.utils",  # causal masks
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",  # verify_global_md_reuse: agreement across ranks
    "megatron.core.dist_checkpointing.exchange_utils",  # tensors received from other ranks
)
_CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


def enable_cpu_support() -> None:
    """Prepare this process for Megatron-Core on CPU; does nothing more when called again or with CUDA."""
    tell_that_transformer_engine_is_missing()
    recompute_in_plain_torch()
    if torch.cuda.is_available() or getattr(torch.cuda.current_device, "is_cpu_support", False):
        return
    _replace_cuda_functions()
    for name in _MODULES_NAMING_CUDA:
        _rewrite_constants(importlib.import_module(name))
    _use_cpu_random_state()
    _use_local_results_queue()
    _use_host_splits()
    _cut_angles_without_pinned_memory()


def _replace_cuda_functions() -> None:
    device = torch.device("cpu")

    def current_device() -> torch.device:
        return device

    current_device.is_cpu_support = True  # type: ignore[attr-defined]
    torch.cuda.current_device = current_device  # type: ignore[assignment]  # every allocation names it
    torch.cuda.synchronize = _nothing  # P2PCommunicator._communicate_shapes, FileSystemWriterAsync
    torch.cuda.empty_cache = _nothing
    torch.cuda.current_stream = _nothing  # type: ignore[assignment]  # 0.19: start_grad_sync waits for CUDA graphs
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _rewrite_constants(module: types.ModuleType) -> None:
    """Rewrite the CUDA constants in every function and method that `module` defines."""
    for owner in (module, *_classes_of(module)):
        for member in list(vars(owner).values()):
            function = _plain_function(member)
            if function is not None and function.__module__ == module.__name__:
                function.__code__ = _rewrite_code(function.__code__)


def _plain_function(member: Any) -> types.FunctionType | None:
    """The plain function behind a function, static or class method, property or decorator."""
    if isinstance(member, property):
        member = member.fget
    member = getattr(member, "__func__", member)
    while hasattr(member, "__wrapped__"):
        member = member.__wrapped__
    return member if isinstance(member, types.FunctionType) else None


def _classes_of(module: types.ModuleType) -> list[type]:
    return [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]


def _rewrite_code(code: types.CodeType) -> types.CodeType:
    return code.replace(co_consts=tuple(_rewrite_constant(constant) for constant in code.co_consts))


def _rewrite_constant(constant: Any) -> Any:
    if isinstance(constant, str):
        return _CONSTANTS.get(constant, constant)
    if isinstance(constant, tuple):
        return tuple(_rewrite_constant(item) for item in constant)
    if isinstance(constant, types.CodeType):  # a nested function or comprehension
        return _rewrite_code(constant)
    return constant


def _use_cpu_random_state() -> None:
    """The tracker of parallel random states works on the CPU generator."""
    from megatron.core.tensor_parallel import random

    def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = set_state
    torch.cuda.get_rng_state = lambda device="cpu": torch.get_rng_state()
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]
    random.CudaRNGStatesTracker.fork = _fork


@contextlib.contextmanager
def _fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """CudaRNGStatesTracker.fork without its warning that the CPU state changed, which here is the point."""
    if name not in tracker.states_:
        raise KeyError(f"random state {name!r} was never added to the tracker")
    outside = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)


def _use_local_results_queue() -> None:
    """_get_write_results_queue starts a manager process for its queue (5 s); a synchronous save needs none."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    make_queue: Callable[[], queue.Queue] = queue.Queue
    filesystem_async._results_queue = make_queue()


def _use_host_splits() -> None:
    """The dispatcher copies split sizes to the host on a stream of its own; gloo wants them as integers."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def take_splits(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            splits = getattr(dispatcher, name)
            if isinstance(splits, torch.Tensor):
                setattr(dispatcher, name, splits.tolist())
        return tokens_per_expert

    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = take_splits
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none"  # its constructor makes one where there is none


def _cut_angles_without_pinned_memory() -> None:
    """YarnRotaryEmbedding cuts angles for a context-parallel rank when it is built, by a tensor in pinned memory."""
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding

    def of_rank(angles: torch.Tensor, dim: int, cp_group: Any) -> torch.Tensor:
        chunks = angles.chunk(2 * cp_group.size(), dim)
        return torch.cat([chunks[cp_group.rank()], chunks[-1 - cp_group.rank()]], dim)

    yarn_rotary_pos_embedding.get_pos_emb_on_this_cp_rank = of_rank
