"""Writing the tensors of a distributed checkpoint from the processes that hold them, without any other process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from chord_megatron.system.atomic import os_error

_FILES = 2  # of a rank, written at once: as many as Megatron-Core 0.16 has writers


def save_sharded(state: dict[str, Any], directory: Path) -> None:
    """What dist_checkpointing.save does, but by `_InProcess`. Collective; an error is raised on all ranks.

    It raises what kept a rank from writing, such as an OSError, in place of torch's CheckpointException of many lines.
    """
    try:
        dist_checkpointing.save(state, str(directory), _InProcess())
    except checkpoint.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


class _InProcess(torch_dist.TorchDistSaveShardedStrategy):
    """The same entries as Megatron-Core's, written here.

    Megatron-Core forks writers (0.16.1; threads in 0.19.2) and starts a server for their answers (both). It waits for a
    killed one without a limit, and SIGKILL of the rank leaves them behind, with its memory and its pipes.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """See save_sharded."""
        main_replicas, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(  # noqa: SLF001 - no public name
            sharded_state_dict, keep_only_main_replica=True
        )
        checkpoint.save(
            torch_dist.mcore_to_pyt_state_dict(main_replicas, False),
            storage_writer=_Writer(checkpoint_dir),
            planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


class _Writer(checkpoint.FileSystemWriter):
    """Writes several files at once; torch's own threads would lose their errors, and with them entries."""

    def __init__(self, directory: str | Path) -> None:
        # Nothing is copied ahead of its writing: torch found that slow from several threads (filesystem.py).
        super().__init__(directory, thread_count=1, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        parts = [part for part in _split(plan.items) if part]
        plans = [
            dataclasses.replace(plan, items=part, storage_data=self._prefix(plan.storage_data, index))
            for index, part in enumerate(parts)
        ]
        write = super().write_data
        with _bare_os_errors(), ThreadPoolExecutor(_FILES) as pool:
            results = list(pool.map(lambda part: write(part, planner).value(), plans))
        done: Future[list[WriteResult]] = Future()
        done.set_result([result for part in results for result in part])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with _bare_os_errors():
            super().finish(metadata, results)

    @staticmethod
    def _prefix(storage_data: Any, index: int) -> Any:
        """__RANK_ -> __RANK_INDEX_, behind which torch counts the files of a plan."""
        return dataclasses.replace(storage_data, prefix=f"{storage_data.prefix}{index}_")


@contextmanager
def _bare_os_errors() -> Iterator[None]:
    """Within, an error that hides one of the operating system is that one: causes do not reach the other ranks."""
    try:
        yield
    except Exception as error:
        if (cause := os_error(error)) is None:
            raise
        raise cause from None


def _split(items: list[WriteItem]) -> list[list[WriteItem]]:
    """The items in as many parts, of about the same size."""
    parts: list[list[WriteItem]] = [[] for _ in range(_FILES)]
    sizes = [0] * _FILES
    for item in sorted(items, key=_size, reverse=True):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(item)
        sizes[smallest] += _size(item)
    return parts


def _size(item: WriteItem) -> int:
    return item.tensor_data.chunk.sizes.numel() if item.tensor_data is not None else 0
