"""Samples of a large data set: made once by all processes together, kept in files, mapped from there by each.

The rows are cut into parts. Each process makes the next part that no other one is making, until there is none left: no
process needs to know of the others, who may be those of another run. A part is a file that appears whole, with a digest
at its end; one that is damaged is made again. docs/decisions/0018-data-cache.md has the reasons.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute

from chord_megatron.data.fingerprint import fingerprint_of, rest_of
from chord_megatron.data.samples import Sample, Samples
from chord_megatron.data.tally import Tally
from chord_megatron.system.atomic import atomic_write, failed_writes_named
from chord_megatron.system.errors import UserError
from chord_megatron.system.work import Work
from chord_megatron.types import ExpertSample, Prompt

ROWS_OF_A_PART = 1024  # of 8,192 tokens they take 300 MB while they are made

Found = TypeVar("Found")
MakeSamples = Callable[[range], tuple[list[Sample], Tally]]

_TOKENS, _TEXT = pa.large_list(pa.int32()), pa.large_string()
_SCHEMAS = {
    Prompt: pa.schema({"id": pa.int64(), "text": _TEXT, "tokens": _TOKENS, "reference": _TEXT, "prefill": _TEXT}),
    ExpertSample: pa.schema(
        {
            "id": pa.int64(),
            "tokens": _TOKENS,
            "prompt_length": pa.int64(),
            "token_weights": pa.large_list(pa.float64()),
        }
    ),
}
_DIGEST_BYTES = 32
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems


class _Part(NamedTuple):
    table: pa.Table
    tally: Tally
    columns: list[str]
    lowest_token: int
    highest_token: int


class StoredSamples(Samples[Sample]):
    """The samples of a folder."""

    def __init__(self, parts: Sequence[_Part], build: Callable[[dict[str, Any]], Sample], fingerprint: str) -> None:
        """build: a sample of the fields that are stored."""
        self._parts, self._fingerprint = parts, fingerprint
        self._build: Callable[[dict[str, Any]], Sample] = build
        self._starts = [0, *accumulate(part.table.num_rows for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, index: int) -> Sample:
        number = bisect_right(self._starts, index) - 1
        fields = self._parts[number].table.slice(index - self._starts[number], 1).to_pylist()[0]
        return self._build({name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def columns(self) -> frozenset[str]:
        return frozenset(name for part in self._parts for name in part.columns)

    def lengths(self) -> Iterator[tuple[int, int]]:
        for part in self._parts:
            yield from zip(part.table["id"].to_pylist(), _token_counts(part.table))

    def holds_token_beyond(self, vocab_size: int) -> bool:
        return any(part.lowest_token < 0 or part.highest_token >= vocab_size for part in self._parts)


def stored_samples(
    folder: Path,
    count: int,
    kind: type[Sample],
    make: MakeSamples[Sample],
    build: Callable[[dict[str, Any]], Sample],
    work: Work,
) -> tuple[StoredSamples[Sample], list[Tally]]:
    """The samples of `count` rows, and what the rows of each part were taken for.

    make: those of some rows, where the folder lacks them. work: is told the rows that all processes have done. Raises
    UserError, and what `make` raises.
    """
    ranges = [range(start, min(start + ROWS_OF_A_PART, count)) for start in range(0, count, ROWS_OF_A_PART)]

    def rows_there() -> int:
        numbers = [int(path.name.removeprefix("part-")) for path in folder.glob("part-*") if not path.suffix]
        return sum(len(ranges[number]) for number in numbers)

    def make_part(rows: range) -> bytes:
        work.done = rows_there()  # `make` goes on from there
        return _make_part(make, rows, kind)

    with failed_writes_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("ab")
    with lock:
        work.done = work.before = rows_there()
        parts: list[_Part | None] = [None] * len(ranges)
        for waits in (False, True):  # first what nobody else is making
            for number, rows in enumerate(ranges):
                if parts[number] is None:
                    parts[number] = _made_once(
                        folder / f"part-{number:05}",
                        _read_part,
                        partial(make_part, rows),
                        _Place(lock, number, waits),
                    )
        work.done = count
        made = [part for part in parts if part is not None]
        tables = [part.table for part in made]
        fingerprint = _made_once(
            folder / "fingerprint", _read_text, lambda: _fingerprint(tables).encode(), _Place(lock, len(ranges), True)
        )
    assert len(made) == len(ranges) and fingerprint is not None
    return StoredSamples(made, build, fingerprint), [part.tally for part in made]


class _Place(NamedTuple):
    """A byte of the lock's file: POSIX knows locks of single bytes, and gives back those of a process that ends."""

    file: IO[bytes]
    byte: int
    waits: bool

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Whether this process holds it; always with `waits`."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | (0 if self.waits else fcntl.LOCK_NB), 1, self.byte)
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                folder = Path(self.file.name).parent
                raise UserError(
                    f"{folder} is on a file system without locks ({error.strerror}); set HF_DATASETS_CACHE to a "
                    "folder on another one"
                ) from None
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, self.byte)


def _made_once(
    path: Path, read: Callable[[Path], Found | None], make: Callable[[], bytes], place: _Place
) -> Found | None:
    """What a file holds, which is written where it is missing or damaged; None where another process is doing that."""
    found = read(path)
    if found is not None:
        return found
    with place.held() as is_held:
        found = read(path) if is_held else None
        if is_held and found is None:
            content = make()
            atomic_write(path, [content, hashlib.sha256(content).digest()])
            found = read(path)
    if is_held and found is None:
        raise UserError(f"{path} cannot be read back; check that disk, or set HF_DATASETS_CACHE to a folder on another")
    return found


def _whole_size(path: Path) -> int | None:
    """Bytes in front of the digest; None where there is no file, or not what was written."""
    try:
        with path.open("rb") as file:
            left = size = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
            digest = hashlib.sha256()
            while left > 0 and (block := file.read(min(left, 2**20))):  # not by its map, which would count as memory
                digest.update(block)
                left -= len(block)
            return size if size > 0 and file.read() == digest.digest() else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); remove {path.parent}") from None


def _read_text(path: Path) -> str | None:
    size = _whole_size(path)
    return None if size is None else path.read_bytes()[:size].decode()


def _read_part(path: Path) -> _Part | None:
    size = _whole_size(path)
    if size is None:
        return None
    with pa.memory_map(str(path)) as file:  # the map stays as long as the table
        table = pa.ipc.open_file(pa.BufferReader(file.read_buffer(size))).read_all()
    notes = json.loads(table.schema.metadata[b"notes"])
    return _Part(table, Tally.from_json(notes.pop("tally")), **notes)


def _make_part(make: MakeSamples[Sample], rows: range, kind: type[Sample]) -> bytes:
    samples, tally = make(rows)
    notes = {
        "tally": tally.to_json(),
        "columns": sorted({name for sample in samples for name in getattr(sample, "columns", ())}),
        "lowest_token": min((min(sample.tokens, default=0) for sample in samples), default=0),
        "highest_token": max((max(sample.tokens, default=0) for sample in samples), default=0),
    }
    schema = _SCHEMAS[kind].with_metadata({"notes": json.dumps(notes)})
    table = pa.Table.from_pylist([vars(sample) for sample in samples], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _token_counts(table: pa.Table) -> list[int]:
    counts: list[int] = pyarrow.compute.list_value_length(table["tokens"]).to_pylist()
    return counts


def _fingerprint(tables: Sequence[pa.Table]) -> str:
    return fingerprint_of(row for table in tables for row in _encoded(table))


def _encoded(table: pa.Table) -> Iterator[tuple[bytes, str]]:
    """As `fingerprint_of` reads rows."""
    if "reference" in table.column_names:
        rests = table["reference"].to_pylist()
    else:
        weights = (None if each is None else tuple(each) for each in table["token_weights"].to_pylist())
        lengths = table["prompt_length"].to_pylist()
        rests = [rest_of(ExpertSample(0, (), length, each)) for length, each in zip(lengths, weights)]
    for tokens, rest in zip(table["tokens"], rests):
        yield tokens.values.to_numpy().astype("<i8").tobytes(), rest
