"""Where rows come from: a .jsonl or .parquet file, or a `datasets` name."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

from chord_megatron.data.bad_rows import BadRow, BadRows
from chord_megatron.data.lazy_lines import LARGE_FILE, LazyLines
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import one_line

Row: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Sequence[Row]


def load_rows(source: str, split: str, bad_rows: BadRows) -> Rows:
    """All rows of `source`: a .jsonl or .parquet file, or a `datasets` name with an optional ":subset".

    `split` applies to a `datasets` name only. Raises UserError where the source cannot be read or is empty.
    """
    path = Path(source).expanduser()
    if path.suffix == ".jsonl":
        rows: Rows = _read_jsonl(path, bad_rows)
    elif path.suffix == ".parquet":
        rows = _read_parquet(path)
    elif path.is_file() or re.fullmatch(r"\.[A-Za-z]+", path.suffix):  # "org/name-v1.5" is a name
        raise UserError(f"cannot read {source}: data files must end in .jsonl or .parquet")
    else:
        rows = _read_hub(source, split)
    if not len(rows) and not bad_rows.count:
        raise UserError(f"{source} has no rows")
    return rows


def _read_jsonl(path: Path, bad_rows: BadRows) -> Rows:
    try:
        if path.stat().st_size > LARGE_FILE:
            rows_of_large_file = LazyLines(path, _parse_line)
            bad_rows.lines = rows_of_large_file.lines
            return rows_of_large_file
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            with bad_rows.at_line(number):
                rows.append(_parse_line(line))
                numbers.append(number)
    bad_rows.lines = numbers
    return rows


def _parse_line(line: bytes) -> dict[str, Any]:
    """A row. JSON allows more than text can hold and than readers agree upon; that is refused here. Raises BadRow."""
    try:
        row = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f" ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise BadRow("not valid JSON", f": {error}") from None
    if not isinstance(row, dict):
        raise BadRow("no JSON object", f" but {_kind(row)}, where each line is an object")
    if b"\\u" in line:
        _refuse_halves(row)
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Without it the last of several equal keys wins in silence."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise BadRow("a key twice in one object", f": {twice!r}")
    return row


def _refuse_constant(name: str) -> Any:
    raise BadRow("NaN or Infinity, which is no JSON", f": {name}")


def _refuse_halves(value: Any) -> None:
    """Halves of surrogate pairs: JSON can write them, UTF-8 and tokenizers cannot."""
    for text in _texts(value):
        half = re.search("[\ud800-\udfff]", text)
        if half:
            raise BadRow("an escape that is no character", f": \\u{ord(half[0]):04x}")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _kind(value: Any) -> str:
    names = {list: "a JSON list", str: "a JSON string", type(None): "a JSON null", bool: "a JSON true or false"}
    return names.get(type(value), "a JSON number")


def _read_parquet(path: Path) -> Rows:
    if not path.is_file():
        raise UserError(f"cannot read {path}: no such file")
    from datasets import Dataset
    from pyarrow.parquet import read_metadata

    try:
        if not read_metadata(path).num_rows:  # `datasets` fails on such a file
            return []
        return cast(Rows, Dataset.from_parquet(str(path)))
    except Exception as error:  # pyarrow and datasets share no base class; datasets hides what pyarrow says
        cause = error.__cause__ or error
        raise UserError(f"{path} is not a readable parquet file: {type(cause).__name__}: {one_line(cause)}") from None


def _read_hub(source: str, split: str) -> Rows:
    from datasets import load_dataset

    name, _, subset = source.partition(":")
    try:
        return cast(Rows, load_dataset(name, subset or None, split=split))
    except Exception as error:  # network, hub, missing subset or split: no shared base class
        raise UserError(
            f"cannot load the data set {source!r} (split {split!r}); check the name and the network, "
            f"or give a .jsonl or .parquet file: {type(error).__name__}: {one_line(error)}"
        ) from None
