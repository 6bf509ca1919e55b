"""One process of an evaluation: what it is asked for, as JSON, and what it prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chord_megatron.backend.groups import shut_down_distributed
from chord_megatron.backend.importing import silence_cuda_advice
from chord_megatron.config import Config
from chord_megatron.evaluation.results import summary
from chord_megatron.evaluation.session import Session
from chord_megatron.system.files import json_text
from chord_megatron.system.processes import signal_name
from chord_megatron.training.process import Process
from chord_megatron.training.stopping import Stopped


@dataclass(frozen=True)
class Request:
    """What the command line hands to each process."""

    config: Config  # as planning/evaluations.py makes it
    step: int | None  # of the run whose weights they are
    output: str
    is_default: bool  # the output, which its settings tell from others beside it
    passing_reward: float
    as_json: bool

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "config": self.config.model_dump()})

    @staticmethod
    def from_json(text: str) -> Request:
        values = json.loads(text)
        return Request(**{**values, "config": Config.model_validate(values["config"])})

    @property
    def passing(self) -> tuple[str, float]:
        """The reward function that says what passes, and what it gives then."""
        functions = self.config.rewards.reward_funcs
        return "accuracy" if "accuracy" in functions else functions[0], self.passing_reward


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code: 2 for what the user can mend, 128 + N after signal N."""
    arguments = sys.argv[1:] if argv is None else argv
    silence_cuda_advice()
    process = _Evaluating()
    try:
        with process.signals.heard():
            return process.run(arguments)
    except Stopped as stopped:
        process.say(f"ended by {signal_name(stopped.number)}; the same command goes on from what is drawn")
        return process.leave(128 + stopped.number)
    finally:
        shut_down_distributed()


class _Evaluating(Process):
    def work(self, arguments: list[str]) -> None:
        request = Request.from_json(arguments[0])
        self.settle(request.config)
        with self.heartbeat():
            session = Session.open(request.config, self.where)
            if self.rank == 0:
                for note in session.data.notes:
                    print(note, file=sys.stderr, flush=True)
            file = session.evaluate(Path(request.output), is_default=request.is_default)
        if file is not None:
            found = {**_asked(request), **summary(file.rows, request.passing), "completions": str(file.path)}
            _show(found, request.as_json)


def _asked(request: Request) -> dict[str, Any]:
    config = request.config
    return {
        "model": config.model.path,
        "step": request.step,
        "prompts": config.data.eval_dataset,
        "k": config.train.eval_num_generations,
        "temperature": config.train.eval_temperature,
        "engine": config.rollout.engine,
        "seed": config.train.seed,
    }


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json_text(result), flush=True)
        return
    from rich.console import Console

    from chord_megatron.evaluation.tables import tables

    Console().print(tables(result))
    print(f"completions: {result['completions']}", flush=True)  # a path is not to be broken
