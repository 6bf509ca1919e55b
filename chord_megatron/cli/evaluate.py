"""`chord-megatron evaluate`: a model, a checkpoint or a run on prompts with checkable answers."""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from chord_megatron.cli.options import PrintJson, ProcessesPerNode
from chord_megatron.system.errors import UserError
from chord_megatron.system.launcher import Launch, run_processes


class Engine(StrEnum):
    """Who draws completions."""

    megatron = "megatron"
    vllm = "vllm"


_OVERRIDE = re.compile(r"\w+\.\w[\w.]*=")
_Prompts = Annotated[
    list[str] | None, typer.Argument(metavar="[PROMPTS] [key=value]...", help="a data file or `datasets` name")
]


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL_OR_RUN", help="a model's folder, a checkpoint, or a run")],
    prompts_and_overrides: _Prompts = None,
    *,
    k: Annotated[int | None, typer.Option(min=1, help="completions of each prompt")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 = greedy")] = None,
    engine: Annotated[Engine | None, typer.Option(help="who draws")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="of a run: latest, best or a step")] = None,
    nproc_per_node: ProcessesPerNode = 1,
    config: Annotated[Path | None, typer.Option(help="in place of the run's own")] = None,
    output: Annotated[
        Path | None, typer.Option(help="file of completions, which the same command goes on with")
    ] = None,
    passing_reward: Annotated[float, typer.Option(help="a completion passes from this reward on")] = 1.0,
    print_json: PrintJson = False,
) -> int:
    """Mean reward, pass@k and maj@k with intervals. A run brings its data, rewards and sampling along.

    Without PROMPTS: the held-out prompts of the run, or of --config. The same command again goes on.
    """
    from chord_megatron.evaluation.target import default_output, evaluation_config, find_target
    from chord_megatron.planning.evaluations import check_evaluation, for_evaluation, with_fitting_lengths
    from chord_megatron.rewards import check_reward_functions
    from chord_megatron.weights.hf_config import read_architecture

    prompts, overrides = _split(prompts_and_overrides or [])
    target = find_target(model, checkpoint)
    asked = {"train.eval_num_generations": k, "train.eval_temperature": temperature}
    overrides += [f"{key}={value}" for key, value in asked.items() if value is not None]
    resolved = for_evaluation(
        evaluation_config(target, prompts, config, overrides),
        engine=None if engine is None else engine.value,
        is_greedy_meant=temperature == 0,
    )
    arch = read_architecture(target.model_dir)
    resolved, note = with_fitting_lengths(resolved, arch.max_position_embeddings)
    check_reward_functions(resolved.rewards.reward_funcs, resolved.rewards.reward_weights)
    check_evaluation(resolved, arch, nproc_per_node)
    if note:
        print(note, file=sys.stderr)
    from chord_megatron.evaluation.main import Request, main

    path = str(output or default_output(target, resolved))
    request = Request(resolved, target.step, path, output is None, passing_reward, print_json).to_json()
    if nproc_per_node > 1:
        command = [sys.executable, "-m", "chord_megatron.evaluation", request]
        return run_processes(Launch(nproc_per_node), command, finishes_its_step=False)
    return main([request])


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """PROMPTS, which may be left out, and the overrides behind them. Raises UserError."""
    prompts = [argument for argument in arguments if not _OVERRIDE.match(argument)]
    if len(prompts) > 1:
        raise UserError(f"PROMPTS is one data file or data set, and these are {len(prompts)}: {', '.join(prompts)}")
    return next(iter(prompts), None), [argument for argument in arguments if _OVERRIDE.match(argument)]
