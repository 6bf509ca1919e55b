"""SwanLab. Key, server and mode come from its own environment variables and login."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chord_megatron.tracking.trackers.protocol import TrackedRun


def open_tracker(run: TrackedRun) -> Swanlab:
    """Begin the run, or go on with it."""
    import swanlab

    return Swanlab(
        swanlab.init(
            project=run.project,
            workspace=run.entity,
            experiment_name=run.label,
            group=run.group,
            tags=list(run.tags) or None,
            config={group: dict(keys) for group, keys in run.config.items()},
            logdir=str(run.directory / "swanlab"),
            id=run.run_id,
            resume="allow",
            settings=swanlab.Settings(
                interactive=False,  # it would ask for a key
                probe={"hardware": False, "runtime": False, "requirements": False, "git": False},
                terminal={"proxy_type": "none"},
            ),
        )
    )


class Swanlab:
    """An open run."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.run_id: str | None = run.id
        self.place: str | None = _place(run)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each chart."""
        self._run.log(dict(values), step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        """As a text."""
        import swanlab

        self._run.log({tag: swanlab.Text(text)}, step=step)

    def table(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """As a table."""
        import swanlab

        table = swanlab.echarts.Table()
        columns = list(rows[0])
        table.add(columns, [["" if row[column] is None else row[column] for column in columns] for row in rows])
        self._run.log({tag: table}, step=step)

    def artifact(self, path: Path) -> None:
        """Among the run's files."""
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def close(self, *, failed: bool) -> None:
        """Waits until everything is sent."""
        if failed:
            self._run.finish(state="crashed", error="the run ended before its last step")
        else:
            self._run.finish()


def _place(run: Any) -> str:
    try:
        return str(run.url)
    except ValueError:  # it has none offline
        return f"swanlab sync {run.dir}"
