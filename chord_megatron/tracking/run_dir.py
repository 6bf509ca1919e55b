"""Where a run keeps its checkpoints: step directories, atomic pointers to the latest and the best, and pruning."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chord_megatron.system.atomic import atomic_write
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import shown
from chord_megatron.system.yaml_text import read_yaml
from chord_megatron.tracking.best import best_step
from chord_megatron.tracking.run_log import LOG_FILES, METRICS_FILE

_STEP = re.compile(r"step_([0-9]{1,15})")
_ALWAYS_THERE = (".metadata", "state.json")  # in a checkpoint


class RunDir:
    """`checkpoints/step_N`, `hf/step_N`, `checkpoints/latest` and `checkpoints/best` of a run; written by rank 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self._checkpoints = path / "checkpoints"
        self._exports = path / "hf"
        self._latest = self._checkpoints / "latest"
        self._best = self._checkpoints / "best"
        self._finished = self._checkpoints / "finished"

    def checkpoint(self, step: int) -> Path:
        """The Megatron checkpoint of the weights after `step` optimizer steps."""
        return self._checkpoints / f"step_{step}"

    def hf(self, step: int) -> Path:
        """The Hugging Face export of the weights after `step` optimizer steps."""
        return self._exports / f"step_{step}"

    def resume_step(self) -> int | None:
        """The step to resume from: what `latest` names, without it the newest complete checkpoint; None: a new run.

        Raises UserError where the pointer leads nowhere, and where something is left that is no start of a new run.
        """
        complete = self._complete_steps()
        if not self.has_pointer:
            if complete:
                return complete[-1]
            for left in (*self._steps_in(self._checkpoints), *self._steps_in(self._exports)):
                raise UserError(
                    f"{self.path} holds {left.relative_to(self.path)} and no complete checkpoint; restore one, or "
                    "choose another train.output_dir"
                )
            return None
        name = _read(self._latest).strip()
        match = _STEP.fullmatch(name)
        if match is None or not self.checkpoint(int(match[1])).is_dir():
            remedy = f"; write the step to go on with into it, one of {', '.join(f'step_{step}' for step in complete)}"
            if not complete:
                remedy = ", and no complete checkpoint is; restore one, or choose another train.output_dir"
            raise UserError(f"{self._latest} names {shown(name)}, which is not there{remedy}")
        return int(match[1])

    @property
    def has_pointer(self) -> bool:
        """Whether something names the latest checkpoint."""
        return self._latest.exists()

    def lacks_export(self, step: int) -> bool:
        """Whether a save of `step` was killed after its checkpoint, before its export and the first pointer."""
        return not self.has_pointer and not self.hf(step).exists()

    @property
    def has_begun(self) -> bool:
        """Whether there is anything of a step."""
        metrics = self.path / METRICS_FILE
        return self._checkpoints.exists() or (metrics.exists() and metrics.stat().st_size > 0)

    def settings(self) -> dict[str, Any]:
        """What config.yaml says, by dotted key; nothing where it is missing. Raises UserError."""
        if not self.config.exists():
            return {}
        text = _read(self.config)
        try:
            groups = read_yaml(text)
            settings = {f"{group}.{key}": value for group, keys in groups.items() for key, value in keys.items()}
        except (ValueError, AttributeError):
            settings = {}
        if "train.seed" not in settings:
            raise UserError(
                f"{self.config} is not the configuration of a run; restore it, or choose another train.output_dir"
            )
        return settings

    def refuse_unusable(self) -> None:
        """Raise UserError where the directory can be neither made nor written to."""
        existing = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not existing.is_dir():
            raise UserError(f"{existing} is a file; choose another train.output_dir")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"{existing} cannot be written to; choose another train.output_dir")

    def ending(self, train_iters: int, limits: Mapping[str, int], *, since: str = "") -> str | None:
        """What to say of a run of these settings that left everything it leaves; None: there is more to do.

        limits: keys of train that may end a run early. since: what differs now, in words.
        """
        if not self._finished.exists():
            return None
        mark, _, reason = _read(self._finished).strip().partition("\n")
        if mark == str(train_iters):
            return f"{self.path} is finished{since}; raise train.train_iters to train on"
        reached = next((key for key, limit in limits.items() if mark == _early(train_iters, key, limit)), None)
        return reached and f"{self.path} is finished{since}: {reason}; raise train.{reached} to train on"

    def mark_finished(self, train_iters: int, *, early: tuple[str, int, str] | None = None) -> None:
        """Say so, after the report is written. early: the limit that ended it, its value, and why."""
        lines = [str(train_iters)] if early is None else [_early(train_iters, *early[:2]), early[2]]
        atomic_write(self._finished, [f"{line}\n".encode() for line in lines])

    def set_aside(self, step: int) -> list[str]:
        """Rename what is newer than `step`, whose place a run that goes on from there takes; returns the new names.

        Logs, whose later lines will be written again, are copied then.
        """
        moved = []
        for path in (*self._steps_in(self._checkpoints), *self._steps_in(self._exports)):
            if _step_of(path) > step:
                moved.append(str(path.rename(_free_name(path)).relative_to(self.path)))
        logs = [self.path / name for name in LOG_FILES] if moved else []
        for log in (log for log in logs if log.exists()):
            copy = _free_name(log)
            shutil.copy2(log, copy)
            moved.append(str(copy.relative_to(self.path)))
        return moved

    def publish(self, step: int, keep: int | None, rewards: Mapping[int, float] | None = None) -> list[str]:
        """Make a complete checkpoint the latest, then remove the oldest of this run beyond `keep` (None keeps all).

        rewards: of the evaluations by step, where the best of them is kept, too. Returns a sentence on each folder that
        cannot be removed: the next time it is tried again.
        """
        atomic_write(self._latest, [f"step_{step}\n".encode()])
        best = None if rewards is None else self.mark_best(rewards)
        saved = [other for other in self.saved_steps() if other <= step]
        stale = [old for old in saved[:-keep] if old != best] if keep else []
        # The checkpoint last: it is what a pruning that is killed is taken up again by.
        return [said for old in stale for folder in (self.hf(old), self.checkpoint(old)) for said in _remove(folder)]

    def mark_best(self, rewards: Mapping[int, float]) -> int | None:
        """Let `best` name the saved step with the highest of these rewards, the first of equals; returns it."""
        step = best_step(rewards, self.saved_steps())
        if step is None:
            self._best.unlink(missing_ok=True)
        elif step != self.best_step():
            atomic_write(self._best, [f"step_{step}\n".encode()])
        return step

    def best_step(self) -> int | None:
        """What `best` names; None where it names no checkpoint that is there."""
        match = _STEP.fullmatch(_read(self._best).strip()) if self._best.exists() else None
        return int(match[1]) if match and self.checkpoint(int(match[1])).is_dir() else None

    def saved_steps(self) -> list[int]:
        """The steps whose checkpoints are there, in order."""
        return [_step_of(path) for path in self._steps_in(self._checkpoints)]

    def _complete_steps(self) -> list[int]:
        return [s for s in self.saved_steps() if all((self.checkpoint(s) / name).is_file() for name in _ALWAYS_THERE)]

    @staticmethod
    def _steps_in(folder: Path) -> list[Path]:
        """The step_N there, in order."""
        return sorted((path for path in folder.glob("step_*") if _STEP.fullmatch(path.name)), key=_step_of)


def _early(train_iters: int, key: str, limit: int) -> str:
    """The first line of the mark of a run that ended early."""
    return f"{train_iters} {key}={limit}"


def _free_name(path: Path) -> Path:
    """Beside it, in a name that no step has."""
    numbers = ("" if number == 1 else f"-{number}" for number in itertools.count(1))
    names = (path.with_name(f"{path.name}.set-aside{number}") for number in numbers)
    return next(name for name in names if not name.exists())


def _remove(folder: Path) -> list[str]:
    """What is to be said of it."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{folder} cannot be removed ({error.strerror}) and stays; remove it yourself"]
    return []


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _read(path: Path) -> str:
    """A small file of text. Raises UserError where that is impossible."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); remove it") from None
