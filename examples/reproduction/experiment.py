"""An experiment: which methods are compared on which tasks, read from its YAML, and the runs that it takes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from chord_megatron.config import load_config
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.tracking.summary import eval_points, load_history

Checkpoint = Literal["best", "latest"]
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_OTHER_NAMES = ("base", "recipe", "settings")  # of folders and settings beside those of methods


class Method(BaseModel):
    """Keys over the common recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str
    is_chord: bool = False
    keys: dict[str, Any]
    first: str | None = None  # another method, which has the first half of the budget


class Experiment(BaseModel):
    """What an experiment's YAML holds. Paths are as those of recipes: from where the command is run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str
    setting: str  # of the page: in words
    prepare: dict[Path, str]  # by what it makes, the script that does
    recipe: Path
    base: Path  # the weights that all begin with
    base_in_evidence: bool = False  # small enough to be kept beside the result
    test: Path
    grid: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(min_length=1)
    tuning_seed: int
    seeds: list[int] = Field(min_length=1)
    expert_mark: str
    nproc_per_node: PositiveInt = 1
    side_by_side: PositiveInt = 1  # runs at a time
    tested_checkpoint: Checkpoint = "best"
    keep_checkpoints: bool = True  # of tested runs; their exports stay
    methods: dict[str, Method] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_whole(self) -> Experiment:
        for name, values in (("grid", self.grid), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice: {values}")
        for name, method in self.methods.items():
            first = self.methods.get(method.first) if method.first else None
            if method.first and (first is None or first.first):
                raise ValueError(f"{name} begins with {method.first}, which has to be a method of one stage here")
            if not _NAME.fullmatch(name) or name in _OTHER_NAMES or name.endswith("_first"):
                raise ValueError(
                    f"{name!r} names no method: letters, digits, _ and - do, but for {', '.join(_OTHER_NAMES)} "
                    "and what ends with _first"
                )
        try:
            re.compile(self.expert_mark)
        except re.error as error:
            raise ValueError(f"expert_mark is no regular expression: {error}") from None
        return self

    @property
    def budget(self) -> int:
        """Tokens with a loss that each method may have."""
        budget = load_config(str(self.recipe), []).train.max_loss_tokens
        if budget is None:
            raise UserError(f"{self.recipe} has to set train.max_loss_tokens, the budget of all")
        return budget

    def check_recipe(self) -> None:
        """Raise UserError where it leaves a run without what is read of it afterwards."""
        _ = self.budget
        train = load_config(str(self.recipe), []).train
        if train.eval_steps is None:
            raise UserError(f"{self.recipe} has to set train.eval_steps: learning rates are chosen by evaluations")
        goes_by_best = self.tested_checkpoint == "best" or any(method.first for method in self.methods.values())
        if goes_by_best and not (train.keep_best and train.save_steps and train.eval_steps % train.save_steps == 0):
            raise UserError(
                f"{self.recipe} has to set train.keep_best, and train.save_steps such that each evaluation is of a "
                "saved step: the best checkpoint is tested, or goes on in a second stage"
            )

    def rounds(self) -> tuple[list[str], list[str]]:
        """The methods by themselves, and those whose first stage has the learning rate of one of these."""
        alone = [name for name, method in self.methods.items() if method.first is None]
        return alone, [name for name in self.methods if name not in alone]


def load_experiment(path: Path, methods: list[str] | None = None, seeds: list[int] | None = None) -> Experiment:
    """methods, seeds: instead of those that stand there. Raises UserError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = Experiment.model_validate(values)
        names = methods or list(found.methods)
        if unknown := set(names) - set(found.methods):
            raise UserError(f"{path} has no method {min(unknown)}; it has {', '.join(found.methods)}")
        chosen = {name: values["methods"][name] for name in names}
        return Experiment.model_validate({**values, "methods": chosen, "seeds": seeds or found.seeds})
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {place}: {first['msg']}") from error


@dataclass(frozen=True)
class Trial:
    """One run: a method at a learning rate, from a seed."""

    directory: Path
    method: str
    lr: float
    seed: int
    keys: Mapping[str, Any]
    first: Trial | None = None  # whose best checkpoint it begins with

    @property
    def overrides(self) -> list[str]:
        """What the command gets over the recipe."""
        own = {"optimizer.lr": self.lr, "train.seed": self.seed, "train.output_dir": str(self.directory)}
        model = {} if self.first is None else {"model.path": str(self.first.best_export())}
        return [f"{key}={json.dumps(value)}" for key, value in {**self.keys, **model, **own}.items()]

    @property
    def stages(self) -> list[Trial]:
        """This one behind those that it begins with."""
        return [self] if self.first is None else [*self.first.stages, self]

    @property
    def is_finished(self) -> bool:
        """Whether it has had its budget."""
        return (self.directory / "checkpoints" / "finished").exists()

    def best_export(self) -> Path:
        """The model of the saved step with the best validation."""
        step = RunDir(self.directory).best_step()
        if step is None:
            raise UserError(f"{self.directory} names no best checkpoint; set train.keep_best in the recipe")
        return self.directory / "hf" / f"step_{step}"

    def validation(self, checkpoint: Checkpoint) -> float:
        """The mean reward of that checkpoint on the validation prompts; never of the weights that it began with."""
        rewards = [point.reward for point in eval_points(load_history(self.directory)) if point.step > 0]
        return max(rewards) if checkpoint == "best" else rewards[-1]


def make_trial(
    root: Path, experiment: Experiment, name: str, lr: float, seed: int, grid: Mapping[str, Mapping[float, float]]
) -> Trial:
    """A method's run. grid: validation rewards by method and learning rate, of what it begins with at least."""
    method = experiment.methods[name]
    if method.first is None:
        return Trial(root / name / f"lr_{lr:g}" / f"seed_{seed}", name, lr, seed, method.keys)
    half = {"train.max_loss_tokens": experiment.budget // 2}
    first_lr = chosen_lr(grid[method.first])
    first_keys = {**experiment.methods[method.first].keys, **half}
    first = Trial(root / f"{name}_first" / f"lr_{first_lr:g}" / f"seed_{seed}", name, first_lr, seed, first_keys)
    after = Path(f"lr_{lr:g}_after_{first_lr:g}") / f"seed_{seed}"
    return Trial(root / name / after, name, lr, seed, {**method.keys, **half}, first)


def chosen_lr(found: Mapping[float, float]) -> float:
    """The learning rate with the best validation, the smallest of equals."""
    return min(found, key=lambda lr: (-found[lr], lr))
