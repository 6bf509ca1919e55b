"""Where rows come from: a .jsonl or .parquet file, or a `datasets` name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

from chord_megatron.system.errors import UserError

Row: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Sequence[Row]


def load_rows(source: str, split: str) -> Rows:
    """All rows of `source`: a .jsonl or .parquet file, or a `datasets` name with an optional ":subset".

    `split` applies to a `datasets` name only. Raises UserError where the source cannot be read or is empty.
    """
    path = Path(source).expanduser()
    if path.suffix == ".jsonl":
        rows: Rows = _read_jsonl(path)
    elif path.suffix == ".parquet":
        rows = _read_parquet(path)
    elif path.is_file() or re.fullmatch(r"\.[A-Za-z]+", path.suffix):  # "org/name-v1.5" is a name
        raise UserError(f"cannot read {source}: data files must end in .jsonl or .parquet")
    else:
        rows = _read_hub(source, split)
    if not len(rows):
        raise UserError(f"{source} has no rows")
    return rows


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return [_parse_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} must hold a JSON object, not {type(row).__name__}")
    return row


def _read_parquet(path: Path) -> Rows:
    if not path.is_file():
        raise UserError(f"cannot read {path}: no such file")
    from datasets import Dataset

    try:
        return cast(Rows, Dataset.from_parquet(str(path)))
    except Exception as error:  # pyarrow and datasets share no base class
        raise UserError(f"{path} is not a readable parquet file: {_one_line(error)}") from None


def _read_hub(source: str, split: str) -> Rows:
    from datasets import load_dataset

    name, _, subset = source.partition(":")
    try:
        return cast(Rows, load_dataset(name, subset or None, split=split))
    except Exception as error:  # network, hub, missing subset or split: no shared base class
        raise UserError(
            f"cannot load the data set {source!r} (split {split!r}); check the name and the network, "
            f"or give a .jsonl or .parquet file: {_one_line(error)}"
        ) from None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
