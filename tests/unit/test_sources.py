"""Files that rows come from: kinds, compression, folders, globs, addresses, and some of the rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset

from chord_megatron.data.bad_rows import BadRow, BadRows
from chord_megatron.data.sources import load_rows
from chord_megatron.system.errors import UserError

ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "é\n", "answer": "2"}, {"prompt": "c", "answer": "3"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def load(source: object, split: str = "train", on_bad_row: Any = "stop") -> list[dict[str, Any]]:
    return [dict(row) for row in load_rows(str(source), split, BadRows(str(source), on_bad_row))]


def write_zstd(path: Path, content: bytes) -> None:
    with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(path), "wb"), "zstd") as stream:
        stream.write(content)


def write_parquet(path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(str(path))


def write_stream(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def write_feather(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


CSV = 'prompt,answer\r\na,1\r\n"é\n",2\r\nc,3\r\n'.encode()
KINDS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda path: path.write_bytes(LINES),
    "lines.json": lambda path: path.write_bytes(LINES),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "rows.csv": lambda path: path.write_bytes(CSV),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "parts.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES[:20]) + gzip.compress(LINES[20:])),
    "rows.csv.gz": lambda path: path.write_bytes(gzip.compress(CSV)),
    "rows.json.zst": lambda path: write_zstd(path, LINES),
    "rows.jsonl.zst": lambda path: write_zstd(path, LINES),
    "rows.parquet": write_parquet,
    "rows.arrow": write_stream,
    "feather.arrow": write_feather,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_has_the_same_rows(name, tmp_path):
    KINDS[name](tmp_path / name)
    assert load(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("suffix", "rows"),
    [
        ("#2", ROWS[:2]),
        ("#9", ROWS),
        ("@[1:]", ROWS[1:]),
        ("@[:1]", ROWS[:1]),
        ("@[-1:]", ROWS[-1:]),
        ("@[1:2]", ROWS[1:2]),
        ("@[:]", ROWS),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_some_of_the_rows(name, suffix, rows, tmp_path):
    KINDS[name](tmp_path / name)
    assert load(f"{tmp_path / name}{suffix}") == rows


def test_a_row_of_some_is_named_by_its_place_in_the_file(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    source = f"{tmp_path}/rows.jsonl@[1:3]"
    bad_rows = BadRows(source, "stop")
    load_rows(source, "train", bad_rows)
    with pytest.raises(UserError, match=r"rows\.jsonl@\[1:3\]:3: odd"), bad_rows.at_row(1):
        raise BadRow("odd")


@pytest.mark.parametrize("suffix", ["#0", "@[3:]", "@[2:1]"])
def test_none_of_the_rows(suffix, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    with pytest.raises(UserError, match=r"rows\.jsonl.* has no rows"):
        load(f"{tmp_path}/rows.jsonl{suffix}")


def test_a_folder_and_a_glob_have_the_rows_of_their_files_in_order(tmp_path):
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    for name, row in (("b/2.jsonl", ROWS[2]), ("a.jsonl", ROWS[0]), ("b/1.jsonl", ROWS[1])):
        (folder / name).write_text(json.dumps(row) + "\n")
    (folder / "README.md").write_text("not data")
    (folder / "dataset_info.json").write_text("{}")
    assert load(folder) == ROWS
    assert load(f"{folder}/**/*.jsonl") == ROWS
    assert load(f"{folder}/b/[12].jsonl#1") == ROWS[1:2]


def test_a_row_of_several_files_is_named_by_its_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(LINES)
    bad_rows = BadRows(str(tmp_path), "stop")
    load_rows(str(tmp_path), "train", bad_rows)
    with pytest.raises(UserError, match=r"/b\.jsonl:2: odd"), bad_rows.at_row(4):
        raise BadRow("odd")
    (tmp_path / "b.jsonl").write_bytes(b"{\n" + LINES)
    with pytest.raises(UserError, match=r"/b\.jsonl:1: not valid JSON"):
        load(tmp_path)
    skipping = BadRows(str(tmp_path), "skip")
    assert len(load_rows(str(tmp_path), "train", skipping)) == 6
    assert str(skipping) == f"1 not valid JSON (first: {tmp_path}/b.jsonl line 1)"


def test_a_folder_that_tells_splits_apart_has_the_rows_of_one(tmp_path):
    for name, row in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("test", 2)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROWS[row]) + "\n")
    assert load(tmp_path, "train") == ROWS[:2]
    assert load(tmp_path, "test") == ROWS[2:]
    with pytest.raises(UserError, match=r"has no files of the split 'dev', but of test, train; set the split"):
        load(tmp_path, "dev")


def test_what_datasets_saved_to_disk_is_read(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert load(tmp_path / "saved") == ROWS


@pytest.mark.parametrize("suffix", ["#-1", "#all", "#1_000", "#", "@[a]", "@[::2]", "@[1]", "@[1:2", "@1:2"])
def test_some_rows_that_are_said_otherwise_are_no_name_of_the_hub(suffix, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    with pytest.raises(UserError) as caught:
        load(f"{tmp_path}/rows.jsonl{suffix}")
    assert str(caught.value) == (
        f"{tmp_path}/rows.jsonl{suffix}: {suffix!r} does not say which rows; '#1000' is the first 1,000, '@[10:20]' "
        "rows 10 to 19"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b'[{"a": 1}, 2]', r"rows\.json item 2: no JSON object but a JSON number"),
        ("rows.json", b'[{"a": 1},', r"rows\.json is no JSON list of rows: not valid JSON"),
        ("rows.json", b"[" * 100_000, r"rows\.json is no JSON list of rows: "),
        ("rows.json", b'{\n"data": []\n}', r"rows\.json holds one object; rows are a list of objects"),
        ("rows.json", b"[]", r"rows\.json has no rows"),
        ("rows.csv", b"a,b\n1,2,3\n", r"rows\.csv:2: not as many cells as the header: 3, not 2"),
        ("rows.csv", b"a,a\n1,2\n", r"rows\.csv: its first line must name each column, and no two alike"),
        ("rows.csv", b'a,b\n"1,2\n', r"rows\.csv:2: not readable as CSV: unexpected end of data"),
        ("rows.csv", b"a\n\xff\n", r"rows\.csv is not UTF-8"),
        ("rows.csv", b"", r"rows\.csv has no rows"),
        ("rows.jsonl.gz", b"no gzip", r"cannot read .*rows\.jsonl\.gz: "),
        ("rows.jsonl.gz", gzip.compress(LINES)[:-12], r"cannot read .*rows\.jsonl\.gz: "),
        ("rows.jsonl.zst", b"no zstd", r"cannot read .*rows\.jsonl\.zst: "),
        ("rows.arrow", b"no arrow", r"rows\.arrow is not a readable arrow file: "),
        ("rows.arrow", b"ARROW1 and no more", r"rows\.arrow is not a readable arrow file: "),
        ("rows.parquet.gz", b"", r"data files must end in \.jsonl, \.json, \.csv \(also with"),
        ("rows.txt", b"a", r"cannot read .*rows\.txt: data files must end in"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.attack
@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.jsonl.zst"])
def test_a_file_of_nothing_a_thousand_times_is_refused(name, tmp_path, measure):
    import tracemalloc

    spaces = b" " * (200 * 2**20)
    if name.endswith("gz"):
        (tmp_path / name).write_bytes(gzip.compress(spaces, 1))
    else:
        write_zstd(tmp_path / name, spaces)
    del spaces
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"{name} becomes more than 100 times as large decompressed; decompress it"):
        load(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 160 * 2**20  # of 200 MiB
    tracemalloc.stop()
    measure("bytes decompressed at most", 64 * 2**20)


@pytest.mark.parametrize("source", ["nothing/*.jsonl", "nothing/**"])
def test_a_glob_without_files(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no data file matches nothing/"):
        load(source)


def test_a_folder_of_several_kinds_is_not_guessed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.csv").write_bytes(CSV)
    with pytest.raises(UserError, match=r"has files of several kinds \(\.csv, \.jsonl\); name those to read by a glob"):
        load(tmp_path)


def test_addresses_of_the_hub_reach_datasets(monkeypatch):
    calls = []

    def load_dataset(name, subset, split, **more):
        calls.append((name, subset, split, more))
        return Dataset.from_list([{"a": 1}, {"a": 2}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load("hf://datasets/org/name", "test") == [{"a": 1}, {"a": 2}]
    assert load("hf://datasets/org/name@v1/data/x.jsonl.gz") == [{"a": 1}, {"a": 2}]
    assert load("hf://datasets/org/name@v1") and load("org/name:main#1", "test") == [{"a": 1}]
    assert calls == [
        ("org/name", None, "test", {}),
        ("json", None, "train", {"data_files": "hf://datasets/org/name@v1/data/x.jsonl.gz"}),
        ("org/name", None, "train", {"revision": "v1"}),
        ("org/name", "main", "test", {}),
    ]
    with pytest.raises(UserError, match=r"must look like hf://datasets/OWNER/NAME"):
        load("hf://models/org/name")
