"""One process of a run: its arguments, its exit code, and what it says where it fails."""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from chord_megatron.backend.groups import meet, shut_down_distributed
from chord_megatron.backend.importing import silence_cuda_advice
from chord_megatron.config import Config, load_config
from chord_megatron.system.errors import UserError
from chord_megatron.system.listening import is_loopback, listen_on_loopback
from chord_megatron.system.processes import signal_name
from chord_megatron.tracking.heartbeat import SECONDS_UNTIL_LATE, Heartbeat, Whereabouts
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.tracking.run_lock import held
from chord_megatron.tracking.trackers.opening import refuse_missing_packages
from chord_megatron.training.run import Run
from chord_megatron.training.stopping import Stopped, StopSignals

_SECONDS_FOR_RANK_0 = 60  # to come, where this rank has only a mistake to tell
_SECONDS_FOR_THE_CAUSE = 5  # to be heard first: the launcher ends this process meanwhile

_SIGNS_OF_A_LOST_RANK = ("gloo/transport", "ncclRemoteError")


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit code: 2 for what the user can mend, 128 + N after signal N."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print("usage: python -m chord_megatron.train CONFIG.yaml [key=value ...]", file=sys.stderr)
        return 2
    silence_cuda_advice()
    process = _Process()
    try:
        with process.signals.heard():
            return process.run(arguments)
    except Stopped as stopped:
        process.say(_ending(stopped, process.where))
        return process.leave(128 + stopped.number)
    finally:
        shut_down_distributed()


class _Process:
    """What this process knows of itself, whatever ends it."""

    def __init__(self) -> None:
        self.signals, self.where = StopSignals(), Whereabouts()
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._limit = timedelta(seconds=_SECONDS_FOR_RANK_0)

    def run(self, arguments: list[str]) -> int:
        """Train, or say why not."""
        try:
            config = load_config(arguments[0], arguments[1:])
            if RunDir(Path(config.train.output_dir)).is_finished(config.train.train_iters):
                if self._rank == 0:
                    print(f"{config.train.output_dir} is finished; raise train.train_iters to train on", flush=True)
                return 0
            self._train(config)
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

    def _train(self, config: Config) -> None:
        self._limit = timedelta(minutes=config.parallel.distributed_timeout_minutes)
        _stay_on_this_machine(config)
        with ExitStack() as opened:
            if self._rank == 0:
                run_dir = RunDir(Path(config.train.output_dir))
                run_dir.refuse_unusable()
                refuse_missing_packages(config.tracking.report_to)
                opened.enter_context(held(run_dir.path))
            if self._world_size > 1:
                opened.enter_context(self._heartbeat())
            Run(config, self.signals, self.where).train()

    def _heartbeat(self) -> Heartbeat:
        late = min(SECONDS_UNTIL_LATE, self._limit.total_seconds() / 2)
        store, rank, world_size = meet(self._limit), self._rank, self._world_size
        return Heartbeat(store, self.where, rank=rank, world_size=world_size, seconds_until_late=late)

    def say(self, sentence: str) -> None:
        """On standard error, unless another rank has spoken: all meet the same mistake, or each other's end."""
        try:
            is_first = meet(self._limit).add("chord_megatron/last_words", 1) == 1
        except (RuntimeError, UserError):  # rank 0 has ended, with its store: once on each node
            is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        if is_first:
            print(sentence, file=sys.stderr, flush=True)

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
            f"error: rank {self._rank} has lost another rank, or got no answer from it within "
            f"parallel.distributed_timeout_minutes={minutes:g}, in {self.where} ({reason})"
        )


def _ending(stopped: Stopped, where: Whereabouts) -> str:
    name = signal_name(stopped.number)
    if stopped.saved_step is not None:
        return f"ended by {name} after step {stopped.saved_step}, which is saved; the same command goes on from there"
    return f"ended by {name} in {where}; the same command goes on from the latest checkpoint"


def _stay_on_this_machine(config: Config) -> None:
    """Listen to nobody else where all processes are here; NCCL must still reach servers elsewhere."""
    if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
        rollout = config.rollout
        listen_on_loopback(nccl=rollout.weight_transfer != "broadcast" or is_loopback(rollout.weight_transfer_address))
