"""The trackers of a run, by name: TensorBoard's files are written here and now, the others in the background."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec

from chord_megatron.system.errors import UserError
from chord_megatron.tracking.trackers.background import BackgroundTracker
from chord_megatron.tracking.trackers.memory import Memory
from chord_megatron.tracking.trackers.prometheus import Prometheus
from chord_megatron.tracking.trackers.protocol import TrackedRun, Tracker
from chord_megatron.tracking.trackers.remote import open_remote

MEMORY_FOLDER = "trackers"  # in the run directory


def refuse_missing_packages(names: Iterable[str]) -> None:
    """Raise UserError where the package of a tracker is not installed; its name is the tracker's, and the extra's."""
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # None: a folder of that name, such as wandb leaves in many places
            raise UserError(
                f"tracking.report_to names {name}, which is not installed; run pip install 'chord_megatron[{name}]', "
                "or leave it out"
            )


def open_trackers(names: Sequence[str], run: TrackedRun, say: Callable[[str], None]) -> list[Tracker]:
    """One for each name, and Prometheus where it is to be told.

    Raises UserError: where a file cannot be written, a port not be listened at, or what is known of a run is damaged.
    """
    in_background = [name for name in dict.fromkeys(names) if name != "tensorboard"]
    memories = {name: _memory(run, name) for name in in_background}
    trackers: list[Tracker] = [_tensorboard(run)] if "tensorboard" in names else []
    if run.prometheus is not None:
        trackers.append(Prometheus(*run.prometheus))
    for name, memory in memories.items():
        trackers.append(BackgroundTracker(name, run, functools.partial(open_remote, name), memory, say=say))
    return trackers


def _memory(run: TrackedRun, name: str) -> Memory:
    path = run.directory / MEMORY_FOLDER / f"{name}.json"
    return Memory.read(path) if run.goes_on else Memory(path)


def _tensorboard(run: TrackedRun) -> Tracker:
    from chord_megatron.tracking.trackers.tensorboard import open_tracker  # a second to import

    return open_tracker(run)
