"""Checks of the machine: GPUs, driver, processes that talk to each other, memory and disk."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from chord_megatron.doctor.all_reduce import time_all_reduce
from chord_megatron.doctor.check import Check
from chord_megatron.system.sentences import size

_CGROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own
_DRIVER_SECONDS = 30
_ALL_REDUCE_SECONDS = 120.0  # most of it for the import of torch on a busy machine
_LITTLE_DISK = 10 * 10**9
_BYTES_SAVED = 16  # of a bfloat16 parameter in a checkpoint (14) and an export (2)


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch can use."""

    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int


def find_gpus() -> list[Gpu]:
    """What torch can use; empty on a machine without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that is too old; check_cuda says so
        if not torch.cuda.is_available():
            return []
    return [
        Gpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i), *_gpu_memory(i))
        for i in range(torch.cuda.device_count())
    ]


def _gpu_memory(index: int) -> tuple[int, int]:
    """Free and all bytes. To ask takes some memory itself: nothing is free where it fails."""
    try:
        return torch.cuda.mem_get_info(index)
    except RuntimeError:
        return 0, torch.cuda.get_device_properties(index).total_memory


def check_driver(has_gpu: bool) -> Check:
    """NVIDIA's driver, which comes from the host of a container."""
    name = "NVIDIA driver"
    if shutil.which("nvidia-smi") is None and has_gpu:
        return Check(name, None, "ok", "used; there is no nvidia-smi to ask for its version")
    if shutil.which("nvidia-smi") is None:
        return Check(
            name, None, "missing", "needed for GPUs; containers get it from their host (docker run --gpus all)"
        )
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_SECONDS)
        answer, failed = (done.stdout + done.stderr).strip().splitlines() or ["no answer"], done.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        answer, failed = [str(error)], True
    if failed:
        return Check(name, None, "wrong", f"nvidia-smi fails: {answer[0]}", "install or restart the driver of the host")
    return Check(name, answer[0], "ok", "used")


def check_cuda(gpus: Sequence[Gpu], has_driver: bool) -> Check:
    built_for = torch.version.cuda
    if gpus:
        return Check("CUDA", built_for, "ok", f"{len(gpus)} x {gpus[0].name}")
    replacement = "everything runs on the CPU, which is for tests and tiny models"
    if not has_driver:
        return Check("CUDA", built_for, "replaced", f"no NVIDIA GPU here: {replacement}")
    if built_for is None:
        return Check(
            "CUDA",
            None,
            "wrong",
            f"there is a driver, but torch {torch.__version__} is built without CUDA: {replacement}",
            "install a CUDA build of torch",
        )
    return Check(
        "CUDA",
        built_for,
        "wrong",
        f"there is a driver, but torch sees no GPU ({_cuda_error()}): {replacement}",
        "update the driver or install a torch built for an older CUDA; look at CUDA_VISIBLE_DEVICES",
    )


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return "no device is visible"


def check_nccl(gpus: Sequence[Gpu]) -> Check:
    if not gpus:
        return Check("NCCL", None, "replaced", "needs GPUs; gloo takes its place")
    if not dist.is_nccl_available():
        meaning = "this torch has no NCCL, which GPUs communicate by"
        return Check("NCCL", None, "missing", meaning, "install a CUDA build of torch", is_blocking=True)
    return Check("NCCL", ".".join(map(str, torch.cuda.nccl.version())), "ok", "communication between GPUs")


def check_gloo() -> Check:
    if not dist.is_gloo_available():
        meaning = "this torch has no gloo, which checkpoints and CPU runs need"
        return Check("gloo", None, "missing", meaning, "install a torch from pip", is_blocking=True)
    return Check("gloo", "in torch", "ok", "communication between CPUs; checkpoints gather over it everywhere")


def check_all_reduce(gpus: Sequence[Gpu]) -> Check:
    """Two processes add their numbers: by NCCL where there are two GPUs, else by gloo."""
    backend = "nccl" if len(gpus) >= 2 else "gloo"
    name = f"all-reduce ({backend})"
    try:
        seconds = time_all_reduce(backend, _ALL_REDUCE_SECONDS)
    except RuntimeError as error:
        return Check(name, None, "wrong", f"two processes failed: {error}", _NETWORK_REMEDY[backend], is_blocking=True)
    return Check(name, f"{1000 * seconds:.2f} ms", "ok", "two processes of this machine add a number")


_NETWORK_REMEDY = {
    "gloo": "set GLOO_SOCKET_IFNAME to an interface that is up (`ip address` lists them; lo on a single machine) and "
    "MASTER_ADDR to an address of node 0 that every node reaches",
    "nccl": "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to an interface that is up and MASTER_ADDR to an address of "
    "node 0; in a container give more shared memory (--ipc host or --shm-size 8g); NCCL_DEBUG=WARN says more",
}


def check_gpu_memory(gpus: Sequence[Gpu]) -> Check:
    least = min(gpus, key=lambda gpu: gpu.free_bytes)
    found = f"{size(least.free_bytes)} of {size(least.total_bytes)} free"
    return Check("GPU memory", found, "ok", "on the fullest GPU")


def available_memory() -> int:
    """Bytes of host memory that new processes can take: below the machine's end, and the container's."""
    available = psutil.virtual_memory().available
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" where there is none
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return available
    # The cache of files counts as used and is given up when memory is asked for.
    return min(available, max(0, limit - used + int(statistics.get("inactive_file", 0))))


def check_host_memory() -> Check:
    found = f"{size(available_memory())} of {size(psutil.virtual_memory().total)} free"
    return Check("host memory", found, "ok", "for all processes together")


def check_disk(directory: Path) -> Check:
    free = shutil.disk_usage(directory).free
    meaning = f"holds a checkpoint and an export of {free / _BYTES_SAVED / 1e9:.1f} billion parameters"
    if free < _LITTLE_DISK:
        remedy = "free some space, or name another disk in train.output_dir"
        return Check("disk", f"{size(free)} free", "wrong", f"it {meaning} only", remedy)
    return Check("disk", f"{size(free)} free", "ok", f"{meaning} (bfloat16)")
