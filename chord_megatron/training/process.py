"""A process of a job: how it hears signals, tells where it is, says what ends it, and leaves."""

from __future__ import annotations

import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch.distributed as dist

from chord_megatron.backend.groups import meet
from chord_megatron.config import Config
from chord_megatron.system.errors import UserError
from chord_megatron.system.listening import is_loopback, listen_on_loopback
from chord_megatron.system.sentences import say
from chord_megatron.tracking.heartbeat import SECONDS_UNTIL_LATE, Heartbeat, Whereabouts
from chord_megatron.training.stopping import StopSignals

_SECONDS_FOR_RANK_0 = 60  # to come, where this rank has only a mistake to tell
_SECONDS_FOR_THE_CAUSE = 5  # to be heard first: the launcher ends this process meanwhile

_SIGNS_OF_A_LOST_RANK = ("gloo/transport", "ncclRemoteError")


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


def _stay_on_this_machine(config: Config) -> None:
    """Listen to nobody else where all processes are here; NCCL must still reach servers elsewhere."""
    if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
        rollout = config.rollout
        listen_on_loopback(nccl=rollout.weight_transfer != "broadcast" or is_loopback(rollout.weight_transfer_address))
