"""Writing the tensors of a distributed checkpoint from the processes that hold them, without any other process."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from chord_megatron.system.atomic import os_error
from chord_megatron.system.background import BackgroundFiles

_FILES = 2  # of a rank, written at once: as many as Megatron-Core 0.16 has writers


def save_sharded(state: dict[str, Any], directory: Path, later: BackgroundFiles | None = None) -> None:
    """What dist_checkpointing.save does, but by `_InProcess`. Collective; an error is raised on all ranks.

    later: takes the tensors' files, as they are now, in place of the disk. It raises what kept a rank from writing,
    such as an OSError, in place of torch's CheckpointException of many lines.
    """
    try:
        dist_checkpointing.save(state, str(directory), _InProcess(later))
    except checkpoint.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def raise_on_all_ranks(error: Exception | None) -> None:
    """The first rank's error, or that of the operating system behind it. Collective."""
    errors: list[Exception | None] = [None] * dist.get_world_size()
    known = os_error(error)
    dist.all_gather_object(errors, known if known or error is None else RuntimeError(str(error)))
    for one in errors:
        if one is not None:
            raise one from error


class _InProcess(torch_dist.TorchDistSaveShardedStrategy):
    """The same entries as Megatron-Core's, written here.

    Megatron-Core forks writers (0.16.1; threads in 0.19.2) and starts a server for their answers (both). It waits for a
    killed one without a limit, and SIGKILL of the rank leaves them behind, with its memory and its pipes.
    """

    def __init__(self, later: BackgroundFiles | None) -> None:
        super().__init__("torch_dist", 1)
        self._later = later

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """See save_sharded."""
        main_replicas, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(  # noqa: SLF001 - no public name
            sharded_state_dict, keep_only_main_replica=True
        )
        checkpoint.save(
            torch_dist.mcore_to_pyt_state_dict(main_replicas, False),
            storage_writer=_Writer(checkpoint_dir, self._later),
            planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


class _Writer(checkpoint.FileSystemWriter):
    """Writes several files at once; torch's own threads would lose their errors, and with them entries."""

    def __init__(self, directory: str | Path, later: BackgroundFiles | None) -> None:
        # Nothing is copied ahead of its writing: torch found that slow from several threads (filesystem.py).
        super().__init__(directory, thread_count=1, per_thread_copy_ahead=0, sync_files=later is None)
        if later is not None:
            self.fs = _Later(later)

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
        self.sync_files = True  # what it writes is a file in any case
        with _bare_os_errors():
            super().finish(metadata, results)

    @staticmethod
    def _prefix(storage_data: Any, index: int) -> Any:
        """__RANK_ -> __RANK_INDEX_, behind which torch counts the files of a plan."""
        return dataclasses.replace(storage_data, prefix=f"{storage_data.prefix}{index}_")


class _Later(FileSystem):
    """Keeps the tensors' files in memory, as bytes; their offsets and sizes are those that they will have."""

    def __init__(self, files: BackgroundFiles) -> None:
        self._files = files

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if Path(path).suffix != DEFAULT_SUFFIX:
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _Kept() as content:
            yield content
        self._files.add(Path(path), content)


class _Kept(io.BytesIO):
    """Still there when it is closed."""

    def close(self) -> None:
        pass


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
