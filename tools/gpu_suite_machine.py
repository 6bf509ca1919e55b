"""Where a part of tools/gpu_suite.py runs, and what that machine can do at most."""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_environment import hardware, versions
from gpu_suite_models import SHAPES, SIZES, TINY_SHAPES, TINY_SIZES, Shape, Sizes, data_sheet_tflops, write_model

PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "apex", "vllm", "transformers", "numpy", "pydantic"),
    *("liger-kernel", "cut-cross-entropy", "trl"),
)
Measurements = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and what was measured before it."""

    work: Path  # files that may go
    tiny: bool
    peaks: dict[str, Any]  # of the part of that name; empty without it

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.tiny else torch.device("cuda", 0)

    @property
    def sizes(self) -> Sizes:
        return TINY_SIZES if self.tiny else SIZES

    def shape(self, name: str) -> Shape:
        return (TINY_SHAPES if self.tiny else SHAPES)[name]

    def model(self, name: str) -> Path:
        """A directory with the model, written where it is not there yet."""
        directory = self.work / name
        if not (directory / "tokenizer.json").is_file():  # the last of its files
            write_model(directory, self.shape(name), self.sizes.dtype, self.device.type)
            if not self.tiny:
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        return directory

    def synchronize(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

    def median_seconds(self, function: Callable[[], object], repeats: int = 20) -> float:
        """After three calls to warm up."""
        return statistics.median([self.seconds(function) for _ in range(3 + repeats)][3:])


def peaks(setting: Setting) -> Measurements:
    """What ratios are quoted to."""
    yield "environment", environment(setting)
    size, copied = (256, 2**20) if setting.tiny else (8192, 2**32)
    on: dict[str, Any] = {"device": setting.device}
    dtype = getattr(torch, setting.sizes.dtype)
    a, b = (torch.randn(size, size, dtype=dtype, **on) for _ in range(2))
    out = torch.empty_like(a)
    tflops = 2 * size**3 / setting.median_seconds(lambda: torch.mm(a, b, out=out)) / 1e12
    yield "matmul", {"size": size, "dtype": setting.sizes.dtype, "tflops_per_second": tflops}
    source, target = (torch.zeros(copied, dtype=torch.uint8, **on) for _ in range(2))
    rate = 2 * copied / setting.median_seconds(lambda: target.copy_(source))
    yield "copy", {"bytes": copied, "bytes_per_second_read_and_written": rate}
    host = torch.zeros(copied // 4, dtype=torch.uint8, pin_memory=not setting.tiny)
    part = target[: len(host)]
    to_host = len(host) / setting.median_seconds(lambda: host.copy_(part, non_blocking=True), 5)
    to_device = len(host) / setting.median_seconds(lambda: part.copy_(host, non_blocking=True), 5)
    yield "pinned_host", {"to_host_bytes_per_second": to_host, "to_device_bytes_per_second": to_device}


def environment(setting: Setting) -> dict[str, Any]:
    """Hardware, driver and versions."""
    found: dict[str, Any] = {"device": setting.device.type, "hardware": hardware(), "versions": versions(PACKAGES)}
    found["commit"] = printed("git", "rev-parse", "HEAD")
    if not setting.tiny:
        found["driver"] = printed("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["cudnn"] = torch.backends.cudnn.version()
        found["data_sheet_tflops"] = data_sheet_tflops(found["hardware"]["gpu"])
    return found


def printed(*command: str) -> str | None:
    """What a command prints, None where it fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
