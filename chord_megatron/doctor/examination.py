"""Which checks are made, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from chord_megatron.config import Config
from chord_megatron.doctor import configuration, machine, software
from chord_megatron.doctor.check import Check
from chord_megatron.planning.activations import layers_here
from chord_megatron.planning.plan import Plan
from chord_megatron.planning.rank_memory import fullest_rank
from chord_megatron.weights.architecture import ModelArchitecture


def examine() -> list[Check]:
    """What this machine has."""
    gpus = machine.find_gpus()
    return [
        *_examine_common(gpus, uses_vllm=False),
        *([machine.check_gpu_memory(gpus)] if gpus else []),
        machine.check_host_memory(),
        machine.check_disk(Path.cwd()),
    ]


def examine_for(config: Config, arch: ModelArchitecture, plan: Plan, nproc_per_node: int) -> list[Check]:
    """What this machine has, and whether this run, of so many processes here, can work on it."""
    gpus = machine.find_gpus()
    ranks_of_stage = plan.world_size // config.parallel.pipeline_model_parallel_size
    gpu_bytes = configuration.fullest_gpu(gpus, nproc_per_node).total_bytes if gpus else 0
    memory = fullest_rank(config, arch, plan, layers=layers_here(), gpu_bytes=gpu_bytes)
    return [
        # Servers have GPUs of their own.
        *_examine_common(gpus, uses_vllm=config.rollout.vllm_mode == "colocate"),
        configuration.check_weights(Path(config.model.path), arch),
        configuration.check_tokenizer(config, arch),
        configuration.check_processes(gpus, nproc_per_node),
        configuration.check_dtype(gpus, config.model.dtype),
        *([] if gpus else [software.check_adam_on_cpu()]),
        *([configuration.check_gpu_memory(memory, gpus, nproc_per_node)] if gpus else []),
        configuration.check_host_memory(memory, gpus, nproc_per_node, ranks_of_stage),
        configuration.check_output_dir(Path(config.train.output_dir)),
        configuration.check_disk(config, arch),
    ]


def _examine_common(gpus: Sequence[machine.Gpu], *, uses_vllm: bool) -> list[Check]:
    has_gpu = bool(gpus)
    driver = machine.check_driver(has_gpu)
    checks: list[Callable[[], Check]] = [
        software.check_python,
        software.check_package,
        *(partial(software.check_declared, name) for name in software.DECLARED),
        software.check_dependencies,
        partial(software.check_torchvision, uses_vllm=uses_vllm),
        lambda: driver,
        partial(machine.check_cuda, gpus, has_driver=driver.status != "missing"),
        partial(machine.check_nccl, gpus),
        machine.check_gloo,
        partial(machine.check_all_reduce, gpus),
        partial(software.check_transformer_engine, has_gpu),
        software.check_apex,
        partial(software.check_triton, has_gpu),
        partial(software.check_vllm, uses_vllm=uses_vllm),
    ]
    with ThreadPoolExecutor(max_workers=4) as pool:  # they wait for processes that import large libraries
        return list(pool.map(lambda check: check(), checks))
