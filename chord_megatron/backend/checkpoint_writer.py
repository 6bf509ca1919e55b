"""Writing the tensors of a distributed checkpoint from the processes that hold them, without any other process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper
from torch.futures import Future

from chord_megatron.system.atomic import os_error
from chord_megatron.system.background import Check

_FILES = 2  # of a rank, written at once: as many as Megatron-Core 0.16 has writers


Copies = dict[MetadataIndex, Tensor]  # on the host, of each tensor that a rank writes; kept from save to save


def begin_sharded(state: dict[str, Any], directory: Path, copies: Copies | None = None) -> ShardedWrite:
    """What dist_checkpointing.save does, but for writing the tensors. Collective; an error is raised on all ranks.

    copies: filled with the tensors as they are now, which may change afterwards; None: they stay as they are.
    """
    strategy = _InProcess(copies)
    with _causes_raised():
        dist_checkpointing.save(state, str(directory), strategy)
    assert strategy.begun is not None
    return strategy.begun


class ShardedWrite:
    """This rank's share of a checkpoint's tensors, from the plan of all ranks to the list of what they wrote."""

    def __init__(self, state: dict[str, Any], directory: str | Path, copies: Copies | None) -> None:
        """Collective. The protocol is that of torch's own checkpoint.save (state_dict_saver.py)."""
        self._ranks = _DistWrapper(None, True, 0)
        self._writer = _Writer(directory)
        self._results: list[WriteResult] = []
        planner = torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)

        def plan_mine() -> SavePlan:
            planner.set_up_planner(state, is_coordinator=self._ranks.is_coordinator)
            self._writer.set_up_storage_writer(self._ranks.is_coordinator)
            return self._writer.prepare_local_plan(planner.create_local_plan())

        def plan_all(plans: list[SavePlan]) -> list[SavePlan]:
            plans, self._metadata = planner.create_global_plan(plans)
            return self._writer.prepare_global_plan(plans)

        self._plan = planner.finish_plan(self._ranks.reduce_scatter("plan", plan_mine, plan_all))
        self._resolve = planner.resolve_data
        if copies is not None:
            data = {item.index: _copied(item, planner.resolve_data(item), copies) for item in self._plan.items}
            self._resolve = lambda item: data[item.index]

    def write(self, check: Check) -> None:
        """Without any other rank."""
        self._results = self._writer.write_data(self._plan, _Resolver(self._resolve, check)).value()

    def finish(self, error: Exception | None) -> None:
        """Write the list. Collective; this rank's error, or another's, is raised on all of them."""

        def results_of_mine() -> list[WriteResult]:
            if error is not None:
                raise os_error(error) or error from None
            return self._results

        def finish_all(results: list[list[WriteResult]]) -> None:
            self._writer.finish(self._metadata, results)

        with _causes_raised():
            self._ranks.all_reduce("write", results_of_mine, finish_all)


@dataclasses.dataclass(frozen=True)
class _Resolver:
    """The part of a planner that a writer asks."""

    resolve: Callable[[WriteItem], Any]
    check: Check

    def resolve_data(self, item: WriteItem) -> Any:
        self.check()
        return self.resolve(item)


def _copied(item: WriteItem, data: Any, copies: Copies) -> Any:
    """The same on the host, in the memory of the copy before; what is no tensor, as it is."""
    if not isinstance(data, Tensor):
        return data
    copy = copies.get(item.index)
    if copy is None or (copy.shape, copy.dtype) != (data.shape, data.dtype):
        copy = copies[item.index] = torch.empty_like(data, device="cpu", requires_grad=False)
    return copy.copy_(data.detach())


@contextmanager
def _causes_raised() -> Iterator[None]:
    """Within, what kept a rank from going on, such as an OSError, in place of torch's exception of many lines."""
    try:
        yield
    except checkpoint.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


class _InProcess(torch_dist.TorchDistSaveShardedStrategy):
    """The same entries as Megatron-Core's, written here.

    Megatron-Core forks writers (0.16.1; threads in 0.19.2) and starts a server for their answers (both). It waits for a
    killed one without a limit, and SIGKILL of the rank leaves them behind, with its memory and its pipes.
    """

    def __init__(self, copies: Copies | None) -> None:
        super().__init__("torch_dist", 1)
        self._copies = copies
        self.begun: ShardedWrite | None = None

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """See begin_sharded."""
        main_replicas, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(  # noqa: SLF001 - no public name
            sharded_state_dict, keep_only_main_replica=True
        )
        state = torch_dist.mcore_to_pyt_state_dict(main_replicas, False)
        self.begun = ShardedWrite(state, checkpoint_dir, self._copies)


class _Writer(checkpoint.FileSystemWriter):
    """Writes several files at once; torch's own threads would lose their errors, and with them entries."""

    def __init__(self, directory: str | Path) -> None:
        # Nothing is copied ahead of its writing: torch found that slow from several threads (filesystem.py).
        super().__init__(directory, thread_count=1, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
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
