"""What is evaluated: a model's folder, a checkpoint, or a run with a configuration of its own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chord_megatron.config import Config, load_config
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import shown
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.tracking.summary import run_around

_STEP = re.compile(r"step_([0-9]{1,15})")
# Nothing of training is read.
_NO_TRAINING = ("data.dataset=null", "chord.chord_sft_dataset=null")
# What every configuration must say, and no evaluation reads.
_REQUIRED = ("train.output_dir=evaluations", "train.global_batch_size=8", "train.train_iters=1")


@dataclass(frozen=True)
class Target:
    """Weights with configuration and tokenizer in one folder, and the run that they are of."""

    model_dir: Path
    run_dir: Path | None
    step: int | None

    @property
    def name(self) -> str:
        """For files: a run's checkpoint and its export of the same step have names of their own."""
        path = self.model_dir.resolve()
        is_export = self.run_dir is not None and path.parent.name == "hf"
        return f"hf_{path.name}" if is_export else path.name


def find_target(path: Path, checkpoint: str | None) -> Target:
    """checkpoint: of a run directory `latest`, `best` or a step; None = latest. Raises UserError."""
    path = path.expanduser()
    if path.is_file() and (around := run_around(path)):
        raise UserError(f"{path} is a file; give {around}")
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; name a model's folder, a checkpoint or a run directory")
    is_run = (path / "config.yaml").is_file() and not (path / "config.json").exists()
    if is_run:
        run = RunDir(path)
        step = _step_of(run, checkpoint or "latest")
        return Target(run.checkpoint(step), path, step)
    if checkpoint is not None:
        raise UserError(f"--checkpoint={checkpoint} is for a run directory, and {path} is none; name the checkpoint")
    if not (path / "config.json").is_file():
        steps = sorted(found.name for found in path.glob("step_*"))
        remedy = f"name one in it, such as {path / steps[-1]}" if steps else "name a model's folder or a run directory"
        raise UserError(f"{path} holds neither a model (config.json) nor a run (config.yaml); {remedy}")
    match, run_dir = _STEP.fullmatch(path.resolve().name), path.resolve().parent.parent
    is_of_run = match is not None and (run_dir / "config.yaml").is_file()
    return Target(path, run_dir if is_of_run else None, int(match[1]) if match and is_of_run else None)


def evaluation_config(target: Target, prompts: str | None, file: Path | None, overrides: Sequence[str]) -> Config:
    """The configuration of `file`, else of the run, else the defaults. Raises UserError.

    prompts: a whole file or data set, in place of the configuration's held-out prompts.
    """
    source = file or (target.run_dir / "config.yaml" if target.run_dir else None)
    held_out = [] if prompts is None else [f"data.eval_dataset={_quoted(prompts)}", "data.num_eval_prompts=null"]
    config = load_config(
        source or os.devnull,  # nothing but what follows
        [
            *(() if source else _REQUIRED),
            *held_out,
            *overrides,
            *_NO_TRAINING,
            f"model.path={_quoted(str(target.model_dir))}",
        ],
    )
    if config.data.eval_dataset is None:
        raise UserError(f"name the prompts to evaluate on: {source or 'this command'} has no data.eval_dataset")
    return config


def default_output(target: Target, config: Config) -> Path:
    """Where the completions go, but for the hash of their settings: beside a run's checkpoints, or in this folder."""
    prompts = re.sub(r"[^\w.-]+", "_", Path(config.data.eval_dataset or "").name)[:100]
    train = config.train
    name = f"{target.name}-{prompts}-k{train.eval_num_generations}-t{train.eval_temperature:g}.jsonl"
    return (target.run_dir or Path()) / "evaluations" / name


def _step_of(run: RunDir, checkpoint: str) -> int:
    if checkpoint == "latest":
        step = run.resume_step()
        if step is None:
            raise UserError(f"{run.path} has saved no checkpoint yet; wait for one, or name a model's folder")
        return step
    if checkpoint == "best":
        step = run.best_step()
        if step is None:
            raise UserError(f"{run.path}/checkpoints/best names no checkpoint; train.keep_best=true keeps one")
        return step
    step = int(checkpoint) if re.fullmatch("[0-9]{1,15}", checkpoint) else None
    if step is None or not run.checkpoint(step).is_dir():
        there = ", ".join(map(str, run.saved_steps())) or "none"
        raise UserError(
            f"--checkpoint={shown(checkpoint)[1:-1]} is not a step that {run.path} has saved ({there}), nor best or "
            "latest; name one of these"
        )
    return step


def _quoted(text: str) -> str:
    """As a value of YAML."""
    return json.dumps(text, ensure_ascii=False)
