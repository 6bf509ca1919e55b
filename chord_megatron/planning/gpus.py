"""The GPUs that the planner knows, and what it assumes of how well they are used.

Everything here is from data sheets or an assumption; nothing was measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from chord_megatron.planning.workload import Fill
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import did_you_mean, shown


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node of eight, as sold: units of 10^9 bytes; rates in one direction."""

    name: str
    memory_gb: float  # drivers show some per cent more, which CUDA and NCCL take for themselves
    bf16_tflops: float  # dense: data sheets that say "with sparsity" say twice as much
    hbm_gb_per_s: float
    nvlink_gb_per_s: float  # half of what data sheets call total bandwidth, which is both directions
    network_gb_per_s: float  # of its own adapter to other nodes
    source: str

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.memory_gb * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80, 312, 2039, 300, 25, "NVIDIA A100 80GB SXM data sheet; DGX A100: 8 x 200 Gb/s"),
        Gpu("h100", 80, 989, 3350, 450, 50, "NVIDIA H100 SXM data sheet; DGX H100: 8 x 400 Gb/s"),
        Gpu("h800", 80, 989, 3350, 200, 50, "NVIDIA H800 SXM data sheet: NVLink 400 GB/s; adapters as DGX H100's"),
        Gpu("h20", 96, 148, 4000, 450, 50, "NVIDIA H20 SXM data sheet; adapters as DGX H100's"),
        Gpu("h200", 141, 989, 4800, 450, 50, "NVIDIA H200 SXM data sheet; DGX H200: 8 x 400 Gb/s"),
        Gpu("b200", 180, 2250, 8000, 900, 50, "NVIDIA DGX B200 data sheet, of eight: 1,440 GB, 64 TB/s, 8 x 400 Gb/s"),
        Gpu("b300", 288, 2250, 8000, 900, 100, "NVIDIA DGX B300 data sheet, of eight: 2.3 TB, 64 TB/s, 8 x 800 Gb/s"),
    )
}


def gpu_named(name: str) -> Gpu:
    """Raises UserError."""
    if name.lower() not in GPUS:
        raise UserError(
            f"--gpu {shown(name)} is not known; use one of {', '.join(GPUS)}{did_you_mean(name.lower(), [*GPUS])}"
        )
    return GPUS[name.lower()]


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says. Shares are of the data sheet's rate."""

    mfu: float = 0.5  # of matrix multiplications and attention; communication and idle time are counted beside it
    experts_share: float = 0.7  # of that in layers of experts, whose matrices are small
    memory_share: float = 0.7  # of HBM's rate, for decoding and the optimizer
    link_share: float = 0.8  # of NVLink and network, for large messages
    nvlink_latency: float = 15e-6  # seconds of a collective within a node
    network_latency: float = 40e-6  # across nodes
    decoded_layer: float = 1e-4  # seconds that launching a layer's kernels takes at least, without CUDA graphs
    graphed_layer: float = 1e-5  # with them, in vLLM
    host_gb_per_s: float = 25.0  # between a GPU and its host, pinned
    host_memory_gb_per_s: float = 40.0  # of the host's memory, for each GPU
    disk_gb_per_s: float = 2.0  # of a shared disk that weights go through to vLLM servers
    usable_memory: float = 0.9  # of a GPU: CUDA, NCCL's buffers, cuBLAS and fragmentation take the rest
    fill: Fill = field(default_factory=Fill)  # how long rows are


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind of GPU."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int

    @property
    def is_one_node(self) -> bool:
        return self.gpus <= self.gpus_per_node

    def within_node(self, *, stride: int, size: int) -> bool:
        """Whether a group of `size` ranks, `stride` apart, has all of them in one node, wherever it begins."""
        return self.is_one_node or self.gpus_per_node % (stride * size) == 0
