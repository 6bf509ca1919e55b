"""One process of a run: its arguments, its exit code, and where a signal ends it."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

from chord_megatron.backend.groups import shut_down_distributed
from chord_megatron.backend.importing import silence_cuda_advice
from chord_megatron.config import load_config
from chord_megatron.data.hub import with_local_model
from chord_megatron.system.errors import UserError
from chord_megatron.system.processes import signal_name
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.tracking.run_lock import held
from chord_megatron.tracking.trackers.opening import refuse_missing_packages
from chord_megatron.tracking.waiting import Watch
from chord_megatron.training.beginning import finished
from chord_megatron.training.process import Process
from chord_megatron.training.run import Run
from chord_megatron.training.stopping import Stopped

_SECONDS_FOR_RANK_0_TO_SPEAK = 1


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
