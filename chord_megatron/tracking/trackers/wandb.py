"""Weights & Biases. Key, server and mode come from its own environment variables and login."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from chord_megatron.tracking.trackers.protocol import TrackedRun


def open_tracker(run: TrackedRun) -> Wandb:
    """Begin the run, or go on with it."""
    import wandb

    settings = wandb.Settings(
        console="off",  # the run's console is its own, and so are the arguments and the code of the process
        silent=True,
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,
        x_save_requirements=False,
    )
    if not (wandb.setup().settings.mode in ("offline", "disabled") or wandb.api.api_key):
        raise RuntimeError("there is no key: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline")
    return Wandb(
        wandb.init(
            project=run.project,
            entity=run.entity,
            name=run.label,
            group=run.group,
            tags=list(run.tags) or None,
            config={group: dict(keys) for group, keys in run.config.items()},
            allow_val_change=True,
            dir=str(run.directory),
            id=run.run_id,
            resume="allow",
            settings=settings,
        )
    )


class Wandb:
    """An open run."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.run_id: str | None = run.id
        self.place: str | None = run.url or f"wandb sync {run.settings.sync_dir}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A row of the run's history, with its step's other rows."""
        self._run.log(dict(values), step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        """As a page."""
        import wandb

        self._run.log({tag: wandb.Html(f"<pre>{escape(text)}</pre>", inject=False)}, step=step)

    def table(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """As a table."""
        import wandb

        names = list(rows[0])
        data = [[row[name] for name in names] for row in rows]
        self._run.log({tag: wandb.Table(columns=[*names], data=data, allow_mixed_types=True)}, step=step)

    def artifact(self, path: Path) -> None:
        """Among the run's files."""
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def close(self, *, failed: bool) -> None:
        """Waits until everything is sent."""
        self._run.finish(exit_code=int(failed))
