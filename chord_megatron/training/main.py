"""One process of a run: its arguments, its exit code, and what it says where it fails."""

from __future__ import annotations

import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from chord_megatron.backend.groups import meet, shut_down_distributed
from chord_megatron.backend.importing import silence_cuda_advice
from chord_megatron.config import Config, load_config
from chord_megatron.data.hub import with_local_model
from chord_megatron.system.errors import UserError
from chord_megatron.system.listening import is_loopback, listen_on_loopback
from chord_megatron.system.processes import signal_name
from chord_megatron.system.sentences import say
from chord_megatron.tracking.heartbeat import SECONDS_UNTIL_LATE, Heartbeat, Whereabouts
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.tracking.run_lock import held
from chord_megatron.tracking.trackers.opening import refuse_missing_packages
from chord_megatron.tracking.waiting import Watch
from chord_megatron.training.beginning import finished
from chord_megatron.training.run import Run
from chord_megatron.training.stopping import Stopped, StopSignals

_SECONDS_FOR_RANK_0 = 60  # to come, where this rank has only a mistake to tell
_SECONDS_FOR_RANK_0_TO_SPEAK = 1
_SECONDS_FOR_THE_CAUSE = 5  # to be heard first: the launcher ends this process meanwhile

_SIGNS_OF_A_LOST_RANK = ("gloo/transport", "ncclRemoteError")


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit code: 2 for what the user can mend, 128 + N after signal N."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print("usage: python -m chord_megatron.train CONFIG.yaml [key=value ...]", file=sys.stderr)
        return 2
    silence_cuda_advice()
    process = _Training()
    try:
        with process.signals.heard():
            return process.run(arguments)
    except Stopped as stopped:
        if process.rank:  # rank 0 has bars on its terminal to clear away first, if it was told, too
            time.sleep(_SECONDS_FOR_RANK_0_TO_SPEAK)
        process.say(process.ending(stopped))
        return process.leave(128 + stopped.number)
    finally:
        shut_down_distributed()


class Process(ABC):
    """One of a job: what it knows of itself, whatever ends it."""

    def __init__(self) -> None:
        self.signals, self.where = StopSignals(), Whereabouts()
        self.rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._limit = timedelta(seconds=_SECONDS_FOR_RANK_0)

    @abstractmethod
    def work(self, arguments: list[str]) -> None:
        """What it is there for."""

    def run(self, arguments: list[str]) -> int:
        """Work, or say why not."""
        try:
            self.work(arguments)
        except UserError as error:
            self.say(f"error: {error}")
            return self.leave(2)
        except Exception as error:
            if self._is_of_another_rank(error):
                time.sleep(_SECONDS_FOR_THE_CAUSE)
                self.say(self._lost(error))
                return self.leave(1)
            traceback.print_exc()
            self.leave(1)
            raise
        return 0

    def settle(self, config: Config) -> None:
        """Before anything is asked of other ranks: how long they are waited for, and where they may be."""
        self._limit = timedelta(minutes=config.parallel.distributed_timeout_minutes)
        _stay_on_this_machine(config)

    def heartbeat(self) -> AbstractContextManager[object]:
        """Within, the other ranks hear of this one."""
        if self._world_size == 1:
            return nullcontext()
        late = min(SECONDS_UNTIL_LATE, self._limit.total_seconds() / 2)
        store, rank, world_size = meet(self._limit), self.rank, self._world_size
        return Heartbeat(store, self.where, rank=rank, world_size=world_size, seconds_until_late=late)

    def say(self, sentence: str) -> None:
        """On standard error, unless another rank has spoken: all meet the same mistake, or each other's end."""
        try:
            is_first = meet(self._limit).add("chord_megatron/last_words", 1) == 1
        except (RuntimeError, UserError):  # rank 0 has ended, with its store: once on each node
            is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        if is_first:
            say(sentence, sys.stderr)

    def leave(self, exit_code: int) -> int:
        """The exit code. Ends at once where there are other ranks: they wait in a collective until this one is gone."""
        if self._world_size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_code)
        return exit_code

    def _is_of_another_rank(self, error: Exception) -> bool:
        """Whether it says that another rank has gone, or does not answer; by what gloo, NCCL and the stores write."""
        is_said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_A_LOST_RANK)
        return self._world_size > 1 and (is_said or isinstance(error, dist.DistNetworkError | dist.DistStoreError))

    def _lost(self, error: Exception) -> str:
        minutes = self._limit.total_seconds() / 60
        reason = str(error).splitlines()[0][:200]
        return (
            f"error: rank {self.rank} has lost another rank, or got no answer from it within "
            f"parallel.distributed_timeout_minutes={minutes:g}, in {self.where} ({reason})"
        )


class _Training(Process):
    def __init__(self) -> None:
        super().__init__()
        self._run_dir: RunDir | None = None

    def work(self, arguments: list[str]) -> None:
        config = with_local_model(load_config(arguments[0], arguments[1:]))
        self._run_dir = run_dir = RunDir(Path(config.train.output_dir))
        if (sentence := finished(config)) is not None:
            if self.rank == 0:
                print(sentence, flush=True)
            return
        self.settle(config)
        with ExitStack() as opened:
            if self.rank == 0:
                run_dir.refuse_unusable()
                refuse_missing_packages(config.tracking.report_to)
                opened.enter_context(held(run_dir.path))
            opened.enter_context(self.heartbeat())
            watch = opened.enter_context(Watch(self.where)) if self.rank == 0 else None
            run = Run(config, self.signals, self.where)
            if watch and run.outputs:
                watch.show = run.outputs.log.waiting
            run.train()

    def ending(self, stopped: Stopped) -> str:
        """Where a signal has ended the run, and what the same command does next."""
        name = signal_name(stopped.number)
        if stopped.saved_step is not None:
            at = f"stopped by {name} before step {stopped.saved_step}, with a checkpoint"
        elif self.where.step is None:
            at = f"stopped by {name} at the start" + (f" ({self.where.phase})" if self.where.moves else "")
        else:
            at = f"stopped by {name} at step {self.where.step} ({self.where.phase})"
        try:
            saved = self._run_dir.resume_step() if self._run_dir else None
        except UserError:  # the same command will say it
            return f"{at}; the same command looks for a checkpoint to resume from"
        return f"{at}; the same command {'begins anew' if saved is None else f'resumes from step {saved}'}"


def _stay_on_this_machine(config: Config) -> None:
    """Listen to nobody else where all processes are here; NCCL must still reach servers elsewhere."""
    if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
        rollout = config.rollout
        listen_on_loopback(nccl=rollout.weight_transfer != "broadcast" or is_loopback(rollout.weight_transfer_address))
