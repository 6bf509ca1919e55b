"""The completions of an evaluation in a file: settings in its first line, then a line for each prompt, in order.

What is there is not drawn again, so that a command that was ended goes on; a last line torn by a kill is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from chord_megatron.system.atomic import failed_writes_named
from chord_megatron.system.errors import UserError
from chord_megatron.system.files import JsonLines
from chord_megatron.system.sentences import shown
from chord_megatron.types import FinishReason

_HEADER = b'{"settings"'


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Drawn(_Line):
    """A completion with its rewards."""

    completion: str
    answer: str | None  # in a plain form; None: it has none, or nobody counts votes
    reward: float | None  # None: unscorable
    rewards: dict[str, float | None]  # by function
    reward_errors: NonNegativeInt
    tokens: NonNegativeInt
    finish_reason: FinishReason


class Answered(_Line):
    """A prompt with its completions."""

    prompt_id: NonNegativeInt  # row number in the data set
    source: str
    prompt: str
    reference: str
    completions: list[Drawn]


def name_by_settings(path: Path, settings: Mapping[str, Any]) -> Path:
    """The file's name with a short hash of the settings, so that others have a file beside it."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return path.with_name(f"{path.stem}-{digest}{path.suffix}")


class EvaluationFile:
    """Open from construction to the end of its context, for this process alone; `rows` are those that are there."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """settings: what the completions follow from; of them `num_prompts`, `k` and `reward_funcs` say how many there
        are. Raises UserError where the file is of other settings, damaged, or being written.
        """
        self.path = path
        with ExitStack() as opened, failed_writes_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = opened.enter_context(path.open("ab"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{path} is being written by another evaluation; wait for it, or name another --output"
                ) from None
            self.rows, length = _read(path, settings)
            os.truncate(path, length)
            self._lines = JsonLines(path)
            opened.callback(self._lines.close)
            if not length:
                self._lines.write({"settings": settings})
            self._opened = opened.pop_all()

    def append(self, rows: Sequence[Answered]) -> None:
        """Write them; they are with the system before it returns. Raises UserError."""
        for row in rows:
            self._lines.write(row.model_dump())
            self.rows.append(row)

    def __enter__(self) -> EvaluationFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()


def _read(path: Path, settings: Mapping[str, Any]) -> tuple[list[Answered], int]:
    """The rows of a file that has these settings, and the length of its whole lines in bytes; a new file has none."""
    content = path.read_bytes()
    length = content.rfind(b"\n") + 1
    if not length:
        if not _HEADER.startswith(content[: len(_HEADER)]):
            raise UserError(f"{path} is not a file of completions; name another --output")
        return [], 0
    first, *lines = content[:length].splitlines()
    _refuse_other_settings(path, _settings_in(path, first), json.loads(json.dumps(settings)))
    if len(lines) > settings["num_prompts"]:
        raise UserError(f"{path} has more lines than there are prompts; name another --output")
    return [_parse(path, number, line, settings) for number, line in enumerate(lines, 2)], length


def _settings_in(path: Path, line: bytes) -> dict[str, Any]:
    try:
        settings = json.loads(line)["settings"]
    except (ValueError, LookupError, TypeError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a file of completions; name another --output")
    return settings


def _refuse_other_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in [*now, *before]:
        if before.get(key) != now.get(key):
            raise UserError(
                f"{path} holds completions drawn with {key}={shown(before.get(key))}, and now it is "
                f"{shown(now.get(key))}; restore that, or name another --output"
            )


def _parse(path: Path, number: int, line: bytes, settings: Mapping[str, Any]) -> Answered:
    try:
        row = Answered.model_validate_json(line)
    except ValidationError:
        row = None
    functions = sorted(settings["reward_funcs"])
    if (
        row is None
        or len(row.completions) != settings["k"]
        or any(sorted(drawn.rewards) != functions for drawn in row.completions)
    ):
        raise UserError(f"line {number} of {path} is not a prompt with its completions; name another --output")
    return row
