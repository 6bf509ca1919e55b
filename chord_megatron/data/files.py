"""Rows of one file: JSON, JSON lines, CSV, Parquet, Arrow; compressed, but never without a bound."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

from chord_megatron.data.bad_rows import BadRow, BadRows
from chord_megatron.data.lazy_lines import LARGE_FILE, LazyLines
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import one_line

Row: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Sequence[Row]

_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # pyarrow's names
_MIB = 2**20
# Text of data sets becomes 3 to 20 times smaller; a file made of nothing a thousand times.
_MOST_TIMES, _ALWAYS_FINE = 100, 64 * _MIB
_LONGEST_CELL = 64 * _MIB  # of a CSV file, in characters


def kind_of(path: Path) -> str | None:
    """The ending that says how a file is read, without that of its compression; None where it is no data file."""
    ending = path.suffixes[-2:][0] if path.suffix in _COMPRESSED and len(path.suffixes) > 1 else path.suffix
    is_plain = path.suffix not in _COMPRESSED
    return ending if ending in READERS and (is_plain or ending in _TEXTS) else None


def read_file(path: Path, bad_rows: BadRows) -> Rows:
    """All rows of a file of a known kind. Raises UserError."""
    kind = kind_of(path)
    assert kind is not None
    return READERS[kind](path, bad_rows)


def _read_bytes(path: Path) -> bytes:
    """Raises UserError, also where a compressed file becomes more than anyone would have meant."""
    codec = _COMPRESSED.get(path.suffix)
    with _failures_named(path):
        content = path.read_bytes() if codec is None else _decompress(path, codec)
    return content.removeprefix(codecs.BOM_UTF8)


@contextmanager
def _failures_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or one_line(error)}") from None


def _decompress(path: Path, codec: str) -> bytes:
    import pyarrow

    if not pyarrow.Codec.is_available(codec):
        raise UserError(f"cannot read {path}: this pyarrow has no {codec}; decompress the file")
    most = max(_ALWAYS_FINE, _MOST_TIMES * path.stat().st_size)
    content = bytearray()
    with path.open("rb") as raw, pyarrow.CompressedInputStream(raw, codec) as stream:
        while part := stream.read(_MIB):
            content += part
            if len(content) > most:
                raise UserError(
                    f"{path} becomes more than {_MOST_TIMES} times as large decompressed; decompress it yourself "
                    "if that is meant"
                )
    return bytes(content)


class _Parsed(list[Row]):
    """Rows in memory."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.digest = hashlib.sha256(content).hexdigest()  # of the whole file


def _read_jsonl(path: Path, bad_rows: BadRows) -> Rows:
    """Those of a large file are read when they are asked for; but for one that is compressed, which has no places."""
    with _failures_named(path):
        large = LazyLines(path, _parse_row) if path.suffix == ".jsonl" and path.stat().st_size > LARGE_FILE else None
    if large is None:
        return _parse_lines(_read_bytes(path), bad_rows)
    bad_rows.lines = large.lines
    return large


def _parse_lines(content: bytes, bad_rows: BadRows) -> Rows:
    rows = _Parsed(content)
    lines: list[int] = []
    bad_rows.lines = lines
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            with bad_rows.at_line(number):
                rows.append(_parse_row(line))
                lines.append(number)
    return rows


def _parse_row(line: bytes) -> Row:
    return _as_row(_parse(line))


def _read_json(path: Path, bad_rows: BadRows) -> Rows:
    """A list of objects; or JSON lines, which often have this ending."""
    content = _read_bytes(path)
    if content.split(b"\n", 1)[0].strip() == b"{":
        raise UserError(f"{path} holds one object; rows are a list of objects, or an object on each line")
    if not content.lstrip().startswith(b"["):
        return _parse_lines(content, bad_rows)
    try:
        items = _parse(content)
    except (BadRow, RecursionError) as error:
        raise UserError(f"{path} is no JSON list of rows: {one_line(error)}") from None
    rows = _Parsed(content)
    lines: list[int] = []
    bad_rows.lines, bad_rows.unit = lines, "item"
    for number, item in enumerate(items, 1):
        with bad_rows.at_line(number):
            rows.append(_as_row(item))
            lines.append(number)
    return rows


def _parse(text: bytes) -> Any:
    """JSON allows more than text can hold and than readers agree upon; that is refused here. Raises BadRow."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f" ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise BadRow("not valid JSON", f": {error}") from None
    if b"\\u" in text:
        _refuse_halves(value)
    return value


def _as_row(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRow("no JSON object", f" but {_kind(value)}, where each line is an object")
    return value


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


def _read_csv(path: Path, bad_rows: BadRows) -> Rows:
    """Every cell as the text that it is: "007" stays "007". An empty one is not there."""
    content = _read_bytes(path)
    try:
        text = io.StringIO(content.decode(), newline="")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(text, strict=True)
    rows = _Parsed(content)
    lines: list[int] = []
    bad_rows.lines = lines
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or not all(header):
            raise UserError(f"{path}: its first line must name each column, and no two alike; it is {header}")
        for cells in reader:
            if cells:
                with bad_rows.at_line(reader.line_num):
                    if len(cells) != len(header):
                        raise BadRow("not as many cells as the header", f": {len(cells)}, not {len(header)}")
                    rows.append({name: cell or None for name, cell in zip(header, cells)})
                    lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not readable as CSV: {one_line(error)}") from None
    return rows


def _read_parquet(path: Path, bad_rows: BadRows) -> Rows:
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


def _read_arrow(path: Path, bad_rows: BadRows) -> Rows:
    """A stream, as `datasets` writes it, or a file with a footer, as Feather is."""
    if not path.is_file():
        raise UserError(f"cannot read {path}: no such file")
    import pyarrow
    from datasets import Dataset

    try:
        source = pyarrow.memory_map(str(path))
        has_footer = source.read(6) == b"ARROW1"
        source.seek(0)
        table = (pyarrow.ipc.open_file if has_footer else pyarrow.ipc.open_stream)(source).read_all()
        table.validate(full=True)  # a file that lies about its offsets would be read beyond its end
        return cast(Rows, Dataset(table)) if table.num_rows else []
    except Exception as error:  # of pyarrow and of datasets
        raise UserError(f"{path} is not a readable arrow file: {type(error).__name__}: {one_line(error)}") from None


READERS: dict[str, Callable[[Path, BadRows], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
_TEXTS = (".jsonl", ".json", ".csv")  # that may be compressed
EXAMPLES = ".jsonl, .json, .csv (also with .gz or .zst), .parquet or .arrow"
