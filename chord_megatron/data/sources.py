"""Where rows come from: a file, a folder, a glob, or a `datasets` name; all of them, or some."""

from __future__ import annotations

import glob
import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from chord_megatron.data.bad_rows import BadRows
from chord_megatron.data.cache_key import content_of
from chord_megatron.data.files import EXAMPLES, Row, Rows, kind_of, read_file
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import one_line, shown

__all__ = ["Row", "Rows", "load_rows"]

# slime's rows a to b, `@[a:b]`, and ms-swift's `#N`, here the first N.
_SOME = re.compile(r"(?P<source>.+?)(?:@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]|#(?P<count>\d+))", re.DOTALL)
_MEANT = re.compile(r"(?P<source>.+?)(?P<rows>[#@][^/]*)", re.DOTALL)
_HUB = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")
_HUB_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of `datasets`
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}


def load_rows(source: str, split: str, bad_rows: BadRows) -> Rows:
    """The rows of `source`: files, a folder or a glob of files, or a `datasets` name with an optional ":subset".

    A source may end in "#N", the first N rows, or "@[a:b]", rows a to b as Python slices. `split` is that of a name,
    and of a folder whose files are named after splits. Raises UserError where there is nothing to read.
    """
    named, some = (source, slice(None)) if Path(source).exists() else _some(source)
    rows = _load(named, split, bad_rows)
    bad_rows.first, stop, _ = some.indices(len(rows))
    if some != slice(None):
        rows = _Joined([rows], range(bad_rows.first, stop))
    if not len(rows) and not bad_rows.count:
        raise UserError(f"{source} has no rows")
    return rows


def _some(source: str) -> tuple[str, slice]:
    """A source without what says which of its rows."""
    match = _SOME.fullmatch(source)
    if match is None:
        return source, slice(None)
    if match["count"]:
        return match["source"], slice(int(match["count"]))
    return match["source"], slice(*(int(match[name]) if match[name] else None for name in ("start", "stop")))


def _load(source: str, split: str, bad_rows: BadRows) -> Rows:
    path = Path(source).expanduser()
    if source.startswith("hf://"):
        return _read_hub_address(source, split)
    _refuse_other_rows(source)
    if path.is_dir():
        return _read_files(_files_of(path, split), bad_rows)
    if kind_of(path):
        if not path.is_file() and glob.has_magic(source):
            return _read_files(_matching(str(path)), bad_rows)
        return read_file(path, bad_rows)
    if path.is_file() or re.fullmatch(r"\.[A-Za-z]+", path.suffix):  # "org/name-v1.5" is a name
        raise UserError(f"cannot read {source}: data files must end in {EXAMPLES}")
    if glob.has_magic(source):
        return _read_files(_matching(str(path)), bad_rows)
    return _read_hub(source, split)


def _refuse_other_rows(source: str) -> None:
    """Raises UserError where a data file is followed by what is meant as some of its rows."""
    match = _MEANT.fullmatch(source)
    if match and not Path(source).exists() and (kind_of(Path(match["source"])) or Path(match["source"]).exists()):
        raise UserError(
            f"{source}: {match['rows']!r} does not say which rows; '#1000' is the first 1,000, '@[10:20]' rows 10 to 19"
        )


def _matching(pattern: str) -> list[Path]:
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in paths if kind_of(path) and path.is_file() and path.name not in _NOT_DATA]
    if not files:
        raise UserError(f"no data file matches {pattern}; data files end in {EXAMPLES}")
    return files


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files of a folder and those in it, of one split where their names tell splits apart. Raises UserError."""
    files = _matching(f"{glob.escape(str(folder))}/**/*")
    splits = {path: _splits_in(path.relative_to(folder)) for path in files}
    if any(splits.values()):
        files = [path for path in files if split in splits[path]]
        if not files:
            known = sorted(set().union(*splits.values()))
            raise UserError(f"{folder} has no files of the split {split!r}, but of {', '.join(known)}; set the split")
    kinds = sorted({str(kind_of(path)) for path in files})
    if len(kinds) > 1:
        raise UserError(f"{folder} has files of several kinds ({', '.join(kinds)}); name those to read by a glob")
    return files


def _splits_in(path: Path) -> set[str]:
    return _SPLITS.intersection(re.split(r"[^A-Za-z]+", str(path).lower()))


def _read_files(paths: Sequence[Path], bad_rows: BadRows) -> Rows:
    """The rows of several files, one after the other."""
    if len(paths) == 1:
        return read_file(paths[0], bad_rows)
    parts: list[Rows] = []
    for path in paths:
        parts.append(read_file(path, bad_rows.of_file(str(path), sum(map(len, parts)))))
    return _Joined(parts)


class _Joined(Sequence[Row]):
    """Rows of several data sets as those of one, or some of them; none is copied."""

    def __init__(self, parts: Sequence[Rows], rows: range | None = None) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self._parts)))
        self._rows = range(self._ends[-1] if self._ends else 0) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return _Joined(self._parts, self._rows[index])
        row = self._rows[index]
        part = bisect_right(self._ends, row)
        return self._parts[part][row - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def content(self) -> str | None:
        """As of `content_of`: None where all parts are in memory."""
        if not any(map(content_of, self._parts)):
            return None
        contents = [content_of(part) or getattr(part, "digest", None) for part in self._parts]
        return None if None in contents else hashlib.sha256(f"{self._rows} {contents}".encode()).hexdigest()


def _read_hub_address(address: str, split: str) -> Rows:
    """hf://datasets/OWNER/NAME[@REVISION], with a file of it or not."""
    match = _HUB.fullmatch(address)
    if match is None:
        raise UserError(f"{shown(address)} must look like hf://datasets/OWNER/NAME, perhaps with a file behind it")
    if match["file"] is None:
        return _read_hub(match["name"], split, revision=match["revision"])
    kind = next((kind for kind in Path(match["file"]).suffixes if kind in _HUB_READERS), None)
    if kind is None:
        raise UserError(f"cannot read {address}: data files must end in {EXAMPLES}")
    return _read_hub(_HUB_READERS[kind], "train", data_files=address)


def _read_hub(source: str, split: str, **more: Any) -> Rows:
    from datasets import load_dataset

    name, _, subset = source.partition(":")
    more = {key: value for key, value in more.items() if value is not None}
    try:
        rows: Rows = load_dataset(name, subset or None, split=split, **more)
    except Exception as error:  # network, hub, missing subset or split: no shared base class
        raise UserError(
            f"cannot load the data set {more.get('data_files', source)!r} (split {split!r}); check the name and the "
            f"network, or give a file ({EXAMPLES}): {type(error).__name__}: {one_line(error)}"
        ) from None
    return rows
