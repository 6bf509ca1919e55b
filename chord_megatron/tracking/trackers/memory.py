"""What a run directory knows of its run in a tracker: which one it is, and how far each of its curves has come."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from chord_megatron.system.atomic import atomic_write
from chord_megatron.system.errors import UserError
from chord_megatron.system.files import read_json_object


@dataclass(frozen=True)
class Memory:
    """A tracker's run, and the last step that it was sent of each tag. Later ones are new to it, earlier ones are not.

    A run that is resumed takes some steps again, and trackers would show their points twice.
    """

    path: Path
    run_id: str | None = None
    sent: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Memory:
        """An empty one where there is no file. Raises UserError."""
        if not path.exists():
            return cls(path)
        remedy = "remove it, and the tracker shows a new run"
        known = read_json_object(path, remedy)
        run_id, sent = known.get("run_id"), known.get("sent")
        is_id = run_id is None or (isinstance(run_id, str) and run_id.isprintable() and 0 < len(run_id) <= 200)
        if not is_id or not isinstance(sent, dict) or not all(type(step) is int for step in sent.values()):
            raise UserError(f"{path} does not say which run a tracker has, and what of it; {remedy}")
        return cls(path, run_id, sent)

    def lacks(self, tag: str, step: int) -> bool:
        """Whether the tracker has nothing of that step and later ones."""
        return step > self.sent.get(tag, -1)

    def with_sent(self, tags: Iterable[str], step: int) -> Memory:
        """After the tracker has been sent a step of these tags."""
        return Memory(self.path, self.run_id, {**self.sent, **dict.fromkeys(tags, step)})

    def of_run(self, run_id: str | None) -> Memory:
        """Of that run: another one has been sent nothing."""
        return self if run_id == self.run_id else Memory(self.path, run_id)

    def write(self) -> None:
        """Raises UserError."""
        self.path.parent.mkdir(exist_ok=True)
        content = {name: value for name, value in asdict(self).items() if name != "path"}
        atomic_write(self.path, [json.dumps(content, indent=1).encode()])
