"""Trains with the optimizer's states "on the host" and without: `optimizer_offload_worker.py QUESTIONS RESULTS`.

The storages of parameters stand for a GPU: tensors on them say that they are on CUDA, and streams do nothing.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core.optimizer import optimizer_config
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from models_worker import as_sample, copy_weights, train_step
from torch import Tensor

from chord_megatron.backend import engine as engines
from chord_megatron.backend import optimizer as optimizers
from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import ParallelGroups, initialize_distributed, shut_down_distributed
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig

on_gpu: set[int] = set()  # addresses of storages


def main(questions: dict[str, Any], results: Path) -> None:
    """Each rank writes its own."""
    parallel = ParallelConfig(**questions["parallel"])
    groups = initialize_distributed(parallel, seed=0)
    samples = [as_sample(tokens, temperature=1.0) for tokens in questions["sequences"]]
    model = ModelConfig(path=questions["model"])
    answers = {"plain": run(build(model, parallel, groups), samples, results / "plain")}
    with streams_stand_still():
        offloaded = build(model, parallel, groups, optimizer_cpu_offload=True)
        answers["offloaded"] = run(offloaded, samples, results / "offloaded")
        answers["of_which_on_host"] = [len(hybrid.cpu_optimizers) for hybrid in hybrids(offloaded)]
        resumed = build(model, parallel, groups, optimizer_cpu_offload=True)
        resumed.load(results / "offloaded")
        answers["resumed"] = finish(resumed, samples)
        from_plain = build(model, parallel, groups, optimizer_cpu_offload=True)
        from_plain.load(results / "plain")
        answers["from plain"] = finish(from_plain, samples)
    from_offloaded = build(model, parallel, groups)
    from_offloaded.load(results / "offloaded")
    answers["from offloaded"] = finish(from_offloaded, samples)
    torch.save(answers, results / f"{groups.rank}.pt")
    shut_down_distributed()


def build(model: ModelConfig, parallel: ParallelConfig, groups: ParallelGroups, **settings: Any) -> MegatronEngine:
    optimizer = OptimizerConfig(lr=0.01, weight_decay=0.1, clip_grad=0.5, use_distributed_optimizer=True, **settings)
    wrap = engines.wrap_data_parallel

    def wrap_and_note(*arguments: Any, **options: Any) -> Any:
        wrapped = wrap(*arguments, **options)
        on_gpu.update(p.untyped_storage().data_ptr() for chunk in wrapped for p in chunk.parameters())
        return wrapped

    with mock.patch.object(engines, "wrap_data_parallel", wrap_and_note):
        return MegatronEngine(model, parallel, optimizer, groups, train_iters=4, keep_reference=False)


def run(engine: MegatronEngine, samples: list, checkpoint: Path) -> dict[str, Any]:
    """Two steps, a checkpoint, and what comes after it."""
    steps = [train_step(engine, samples) for _ in range(2)]
    engine.save(checkpoint, {})
    return {"steps": steps, **finish(engine, samples)}


def finish(engine: MegatronEngine, samples: list) -> dict[str, Any]:
    return {"last": [train_step(engine, samples) for _ in range(2)], "weights": copy_weights(engine)}


def hybrids(engine: MegatronEngine) -> list[HybridDeviceOptimizer]:
    return [inner.optimizer for inner in engine._optimizer.chained_optimizers]


@contextlib.contextmanager
def streams_stand_still() -> Iterator[None]:
    """What HybridDeviceOptimizer asks of CUDA."""
    event = SimpleNamespace(synchronize=lambda: None, wait=lambda stream: None)
    stream = SimpleNamespace(wait_stream=lambda other: None, record_event=lambda: event)
    installed = SimpleNamespace(cuda=True, adam="TransformerEngine")
    has_gpu = mock.patch.object(optimizers, "find_installed", lambda: installed)
    make = optimizers._optimizer_config

    def make_unpinned(*arguments: Any) -> Any:
        config = make(*arguments)
        config.pin_cpu_grads = False
        return config

    def is_cuda(tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in on_gpu

    with (
        has_gpu,
        mock.patch.object(optimizer_config, "is_te_min_version", lambda version: True),
        mock.patch.object(optimizers, "_optimizer_config", make_unpinned),
        mock.patch.object(torch.cuda, "current_stream", lambda: stream),
        mock.patch.object(torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        mock.patch.object(Tensor, "is_cuda", property(is_cuda), create=True),
    ):
        yield


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
