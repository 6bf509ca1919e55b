"""What a tracker does, and what it is told of the run. Each file NAME.py here has `open_tracker(run) -> Tracker`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class TrackedRun:
    """How a tracker is to show a run, and where its own files may lie. None: as the tracker's library has it."""

    directory: Path  # of the run
    project: str = "chord_megatron"
    name: str | None = None  # None: the directory's
    group: str | None = None
    tags: Sequence[str] = ()
    entity: str | None = None  # a team or user
    uri: str | None = None  # a server or store
    prometheus: tuple[str, int] | None = None  # the host and port to tell Prometheus at
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by group and key, without secrets
    resume_step: int | None = None  # the next step of a run that goes on; None: a new run
    goes_back: bool = False  # behind a checkpoint of its own: what trackers have of it is of another run
    run_id: str | None = None  # of the run to go on with; None: a new one

    @property
    def label(self) -> str:
        """Its name."""
        return self.name or self.directory.resolve().name

    @property
    def goes_on(self) -> bool:
        """Whether a tracker may have this very run."""
        return self.resume_step is not None and not self.goes_back


class TrackerGone(RuntimeError):
    """It has to be opened again."""


class Tracker(Protocol):
    """An open run of a tracker. A method may raise anything; what has no place there is dropped."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve, by tag; finite."""

    def text(self, step: int, tag: str, text: str) -> None:
        """Some lines."""

    def table(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with the same columns, of text, numbers and None."""

    def artifact(self, path: Path) -> None:
        """A copy of a file of the run directory."""

    def close(self, *, failed: bool) -> None:
        """Send what is left, and end the run: as one that failed, or as finished."""


class LibraryTracker(Tracker, Protocol):
    """One of a library with a server or store."""

    run_id: str | None  # with which the same run is opened again
    place: str | None  # where somebody looks at it
