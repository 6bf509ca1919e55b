"""Where a run keeps its checkpoints: step directories, an atomic pointer to the latest, and pruning."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chord_megatron.system.atomic import atomic_write
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import shown
from chord_megatron.system.yaml_text import read_yaml

_STEP = re.compile(r"step_([0-9]{1,15})")


class RunDir:
    """`checkpoints/step_N`, `hf/step_N` and `checkpoints/latest` of one run; written by rank 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self._checkpoints = path / "checkpoints"
        self._latest = self._checkpoints / "latest"
        self._finished = self._checkpoints / "finished"

    def checkpoint(self, step: int) -> Path:
        """The Megatron checkpoint of the weights after `step` optimizer steps."""
        return self._checkpoints / f"step_{step}"

    def hf(self, step: int) -> Path:
        """The Hugging Face export of the weights after `step` optimizer steps."""
        return self.path / "hf" / f"step_{step}"

    def latest_step(self) -> int | None:
        """The step to resume from, or None for a new run. Raises UserError when the pointer leads nowhere."""
        if not self._latest.exists():
            return None
        name = self._latest.read_text(encoding="utf-8", errors="replace").strip()
        match = _STEP.fullmatch(name)
        if match is None or not self.checkpoint(int(match[1])).is_dir():
            raise UserError(
                f"{self._latest} names {shown(name)}, which is not there; write a step_N that is, or remove it"
            )
        return int(match[1])

    def saved_steps(self) -> list[int]:
        """The steps whose checkpoints are there, in order."""
        found = (_STEP.fullmatch(path.name) for path in self._checkpoints.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    def refuse_other_run(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError when the directory's config.yaml has other values than these (dotted keys)."""
        existing = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not existing.is_dir():
            raise UserError(f"{existing} is a file; choose another train.output_dir")
        if not self.config.exists():
            return
        before = _read_settings(self.config, settings)
        for key, value in settings.items():
            if before[key] != value:
                raise UserError(
                    f"{self.path} holds a run with {key}={shown(before[key])}, but this one has {shown(value)}; "
                    "choose another train.output_dir"
                )

    def is_finished(self, train_iters: int) -> bool:
        """Whether a run of `train_iters` steps left everything it leaves."""
        if not self._finished.exists():
            return False
        return self._finished.read_text(encoding="utf-8", errors="replace").strip() == str(train_iters)

    def mark_finished(self, train_iters: int) -> None:
        """Say so, after the report is written."""
        atomic_write(self._finished, [f"{train_iters}\n".encode()])

    def publish(self, step: int, keep: int | None) -> None:
        """Make a complete checkpoint the latest, then remove the oldest beyond `keep` (None keeps all)."""
        atomic_write(self._latest, [f"step_{step}\n".encode()])
        saved = self.saved_steps()
        # Later ones are of a run that was taken back to an earlier step: this run writes them again.
        later = [other for other in saved if other > step]
        earlier = [other for other in saved if other <= step]
        for stale in later + (earlier[:-keep] if keep else []):
            shutil.rmtree(self.checkpoint(stale))
            shutil.rmtree(self.hf(stale), ignore_errors=True)


def _read_settings(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """What a run's configuration says of dotted keys. Raises UserError."""
    try:
        groups = read_yaml(path.read_text(encoding="utf-8"))
        return {key: groups[group].get(leaf) for key in keys for group, leaf in [key.split(".")]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is not the configuration of a run; remove it, or choose another train.output_dir"
        ) from None
