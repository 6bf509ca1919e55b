"""The saves of a run: an export and a checkpoint at a time, which become the latest when both are complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.system.background import Background
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.training.export import exported_hf


class _Abandoned(BaseException):
    """Ends what is being saved. No Exception: nothing is wrong with the save."""


class Saves:
    """At most one save goes on at a time. Methods are collective calls of all ranks, unless they say otherwise."""

    def __init__(
        self,
        engine: MegatronEngine,
        run_dir: RunDir,
        model_dir: Path,
        *,
        keep: int | None,
        say: Callable[[str], None] | None,
        rewards: Mapping[int, float] | None = None,
    ) -> None:
        """keep: the newest so many of both; None = all. say: a line in the log; None where others write it.

        rewards: of the evaluations so far by step, where the best saved step is kept beside those.
        """
        self._engine, self._run_dir, self._model_dir = engine, run_dir, model_dir
        self._keep, self._say, self._rewards = keep, say, rewards
        self.last_step: int | None = None  # that was begun here
        self._open = ExitStack()  # of the save that goes on
        self._writing: Background | None = None

    def begin(self, step: int, state: dict[str, Any], *, in_background: bool) -> None:
        """The weights as they are; in the background the checkpoint is there later: see `finish_if_written`."""
        self.finish()
        self.last_step = step
        with ExitStack() as opened:
            opened.enter_context(self._exported(step))
            directory = self._run_dir.checkpoint(step)
            self._writing = opened.enter_context(self._engine.saving(directory, state, in_background=in_background))
            self._open = opened.pop_all()
        if not in_background:
            self.finish()

    def finish(self) -> None:
        """Wait for the save that goes on, if one does."""
        self._writing = None
        self._open.close()

    def finish_if_written(self) -> None:
        """Where every rank has written its files; otherwise later."""
        if self._writing is None:
            return
        is_done = torch.tensor([self._writing.is_done], dtype=torch.int32, device=self._engine.groups.device)
        dist.all_reduce(is_done, op=dist.ReduceOp.MIN)
        if is_done.item():
            self.finish()

    def export(self, step: int) -> None:
        """What a run that was killed between its first checkpoint and the export had still to do."""
        with self._exported(step):
            pass

    def mark_best(self) -> None:
        """After an evaluation: which saved step is the best now. Not collective."""
        if self._rewards is not None:
            self._run_dir.mark_best(self._rewards)

    def abandon(self) -> None:
        """Leave nothing of the save that goes on. Not collective."""
        try:
            with self._open.pop_all():
                raise _Abandoned
        except _Abandoned:
            pass

    @contextmanager
    def _exported(self, step: int) -> Iterator[None]:
        """Within, the checkpoint is saved, if it is not there. Then both are the latest."""
        with exported_hf(self._engine, self._model_dir, self._run_dir.hf(step)):
            yield
        if self._say is not None:
            for note in self._run_dir.publish(step, self._keep, self._rewards):
                self._say(note)
