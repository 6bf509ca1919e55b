"""Process groups: built once, frozen, passed as arguments everywhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from chord_megatron.backend.cpu import enable_cpu_support
from chord_megatron.config import ParallelConfig
from chord_megatron.system.listening import listen_at
from chord_megatron.system.processes import STORE_FILE


@dataclass(frozen=True)
class ParallelGroups:
    """This process's place in the parallel layout."""

    rank: int
    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup | None  # None without context parallelism
    dp_cp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    vpp_size: int | None

    @property
    def tp_rank(self) -> int:
        return self.tp_group.rank()

    @property
    def tp_size(self) -> int:
        return self.tp_group.size()

    @property
    def pp_rank(self) -> int:
        return self.pp_group.rank()

    @property
    def pp_size(self) -> int:
        return self.pp_group.size()

    @property
    def dp_rank(self) -> int:
        return self.dp_group.rank()

    @property
    def dp_size(self) -> int:
        return self.dp_group.size()

    @property
    def cp_rank(self) -> int:
        return self.cp_group.rank() if self.cp_group else 0

    @property
    def cp_size(self) -> int:
        return self.cp_group.size() if self.cp_group else 1

    @property
    def ep_rank(self) -> int:
        return self.ep_group.rank()

    @property
    def ep_size(self) -> int:
        return self.ep_group.size()

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this pipeline's last stage: where the losses are."""
        return dist.get_global_rank(self.pp_group, self.pp_size - 1)


def initialize_distributed(parallel: ParallelConfig, seed: int) -> ParallelGroups:
    """Join the job that torchrun started (or a job of one), and split it into the parallel groups.

    Called again in the same process, it returns the groups that are there.
    """
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu:
        torch.cuda.set_device(local_rank)
    enable_cpu_support()
    limit = timedelta(minutes=parallel.distributed_timeout_minutes)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            rank=int(os.environ.get("RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            timeout=limit,
            store=dist.PrefixStore("default_group", meet(limit)),
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            # Experts are small: whole ones on more ranks compute faster than slices of them, and send less.
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=True,  # checkpoints gather optimizer state over them
            distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        )
    model_parallel_cuda_manual_seed(seed)
    return ParallelGroups(
        rank=dist.get_rank(),
        device=torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group() if parallel.context_parallel_size > 1 else None,
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        vpp_size=parallel.virtual_pipeline_model_parallel_size,
    )


@cache
def meet(limit: timedelta) -> dist.Store:
    """What all processes of the job read and write, as the launcher's or torchrun's environment variables say.

    Rank 0 keeps it, where it is no file, at MASTER_ADDR alone if that is an address of its machine. The others wait for
    rank 0 until the limit. Raises UserError where rank 0 cannot have the port.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if world_size == 1:
        return dist.HashStore()
    if STORE_FILE in os.environ:
        store = dist.FileStore(os.environ[STORE_FILE], world_size)
        store.set_timeout(limit)
        return store
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_keeper = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    listener = listen_at(address, port) if is_keeper else None
    return dist.TCPStore(
        address,
        port,
        is_master=is_keeper,
        timeout=limit,
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener else None,
    )


def shut_down_distributed() -> None:
    """Leave the job, and forget its groups: the same process may join another one."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    meet.cache_clear()
