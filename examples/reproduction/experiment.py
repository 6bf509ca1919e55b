"""An experiment: which methods are compared on which tasks, read from its YAML, and the runs that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from chord_megatron.config import load_config
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.tracking.summary import eval_points, load_history


class Method(BaseModel):
    """Keys over the common recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str
    keys: dict[str, Any]
    first: str | None = None  # another method, which has the first half of the budget


class Experiment(BaseModel):
    """What an experiment's YAML holds. Paths are as those of recipes: from where the command is run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str
    setting: str  # of the page: in words
    prepare: dict[Path, list[str]]  # by what it makes, the script that does
    recipe: Path
    base: Path  # the weights that all begin with
    base_in_evidence: bool = False  # small enough to be kept beside the result
    test: Path
    grid: list[PositiveFloat]
    tuning_seed: int
    seeds: list[int]
    expert_mark: str
    nproc_per_node: PositiveInt = 1
    side_by_side: PositiveInt = 1  # runs at a time
    tested_checkpoint: Literal["best", "latest"] = "best"
    keep_checkpoints: bool = True  # of tested runs; their exports stay
    methods: dict[str, Method]

    @property
    def budget(self) -> int:
        """Tokens with a loss that each method may have."""
        budget = load_config(str(self.recipe), []).train.max_loss_tokens
        if budget is None:
            raise UserError(f"{self.recipe} has no train.max_loss_tokens: methods are compared on the same budget")
        return budget

    def rounds(self) -> tuple[list[str], list[str]]:
        """The methods by themselves, and those whose first stage has the learning rate of one of these."""
        alone = [name for name, method in self.methods.items() if method.first is None]
        return alone, [name for name in self.methods if name not in alone]


def load_experiment(path: Path) -> Experiment:
    """Raises pydantic's ValidationError."""
    return Experiment.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


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
        own = {"optimizer.lr": self.lr, "train.seed": self.seed, "train.output_dir": self.directory}
        model = {} if self.first is None else {"model.path": self.first.best_export()}
        return [f"{key}={value}" for key, value in {**self.keys, **model, **own}.items()]

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
        assert step is not None, self.directory
        return self.directory / "hf" / f"step_{step}"

    def validation(self) -> float:
        """The best mean reward on the validation prompts after a step: not of the weights that it began with."""
        return max(point.reward for point in eval_points(load_history(self.directory)) if point.step > 0)


def make_trial(
    root: Path, experiment: Experiment, name: str, lr: float, seed: int, grid: Mapping[str, Mapping[float, float]]
) -> Trial:
    """A method's run. grid: validation rewards by method and learning rate, of what it begins with at least."""
    method, at = experiment.methods[name], Path(f"lr_{lr:g}") / f"seed_{seed}"
    if method.first is None:
        return Trial(root / name / at, name, lr, seed, method.keys)
    half = {"train.max_loss_tokens": experiment.budget // 2}
    first_lr = chosen_lr(grid[method.first])
    first_keys = {**experiment.methods[method.first].keys, **half}
    first = Trial(root / f"{name}_first" / f"lr_{first_lr:g}" / f"seed_{seed}", name, first_lr, seed, first_keys)
    return Trial(root / name / at, name, lr, seed, {**method.keys, **half}, first)


def chosen_lr(found: Mapping[float, float]) -> float:
    """The learning rate with the best validation, the smallest of equals."""
    return min(found, key=lambda lr: (-found[lr], lr))
