"""Large data sets: made once by all processes together, mapped by each, and the same samples as of a small one."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from chord_megatron.config import ChordConfig, DataConfig
from chord_megatron.data.fingerprint import fingerprint
from chord_megatron.data.load import RunData, load_run_data
from chord_megatron.data.mixture import cursor_over
from chord_megatron.data.samples import columns_of, holds_token_beyond, lengths_of
from chord_megatron.data.stored import StoredSamples, stored_samples
from chord_megatron.data.tally import Tally
from chord_megatron.system.errors import UserError
from chord_megatron.system.work import Work
from chord_megatron.types import ExpertSample
from tests.unit.chat_templates import QWEN25, tokenizer_of

TOKENIZER = tokenizer_of(QWEN25)
ROWS: list[dict[str, Any]] = [
    {"prompt": f"question {n}" + " very long" * 40 * (n % 7 == 3), "answer": f"é{n}", "level": n, "x": [1.5, None]}
    for n in range(25)
]
ROWS[4] = {"messages": [{"role": "user", "content": "4?"}, {"role": "assistant", "content": "4"}], "answer": "4"}
ROWS[6] = {"prompt": "", "answer": "6"}
ROWS[21] = {"prompt": "", "answer": "21"}
fork = multiprocessing.get_context("fork")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "chord_megatron"


@pytest.fixture
def large(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """From now on five rows are a large data set of one part."""
    monkeypatch.setattr("chord_megatron.data.files.LARGE_FILE", 0)
    monkeypatch.setattr("chord_megatron.data.load.FEWEST_ROWS", 5)
    monkeypatch.setattr("chord_megatron.data.stored.ROWS_OF_A_PART", 5)
    return cache


def write_jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")  # a blank line behind each
    return str(path)


def load(source: Any, **data: Any) -> RunData:
    settings = {"dataset": source, "max_prompt_length": 100, "on_bad_row": "skip", **data}
    chord = ChordConfig(chord_sft_dataset=source)
    return load_run_data(DataConfig(**settings), chord, TOKENIZER, expert_max_length=100)


def assert_same(found: RunData, expected: RunData) -> None:
    for name in ("prompts", "experts"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert list(ours) == theirs and len(ours) == len(theirs)
        assert [ours[i] for i in range(-len(theirs), 0)] == theirs and ours[2:7:2] == theirs[2:7:2]
        assert fingerprint(ours) == fingerprint(theirs)
        assert list(lengths_of(ours)) == list(lengths_of(theirs))
        largest = max(token for sample in theirs for token in sample.tokens)
        assert holds_token_beyond(ours, largest) and not holds_token_beyond(ours, largest + 1)
        with pytest.raises(IndexError):
            ours[len(theirs)]
    assert columns_of(found.prompts) == columns_of(expected.prompts)
    assert (found.end_token_ids, found.notes) == (expected.end_token_ids, expected.notes)


def test_the_samples_of_a_large_file_are_those_of_a_small_one(tmp_path: Path, request: pytest.FixtureRequest):
    source = write_jsonl(tmp_path / "rows.jsonl")
    expected = load(source)
    cache = request.getfixturevalue("large")
    found = load(source)
    assert isinstance(expected.prompts, list) and isinstance(found.prompts, StoredSamples)
    assert_same(found, expected)
    skipped = "skipped 2 unusable rows: 2 column 'prompt' must hold text or chat messages (first: line 13)"
    assert found.notes[1] == f"{source}: {skipped}"
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("part-*")}
    assert len(written) == 10
    assert_same(load(source), expected)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("part-*")} == written


def test_parquet_too_and_a_source_among_others(tmp_path: Path, request: pytest.FixtureRequest):
    rows = [{key: row.get(key) for key in ("prompt", "answer", "level", "x")} for row in ROWS if "prompt" in row]
    request.getfixturevalue("cache")
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    sources = [write_jsonl(tmp_path / "few.jsonl", ROWS[:3]), str(tmp_path / "rows.parquet")]
    expected = load(sources)
    request.getfixturevalue("large")
    found = load(sources)
    assert list(found.prompts) == list(expected.prompts) and list(found.experts) == list(expected.experts)
    assert [prompt.source for prompt in found.prompts[1:4]] == ["few.jsonl", "few.jsonl", "rows.parquet"]
    assert fingerprint(found.prompts) == fingerprint(expected.prompts)
    assert columns_of(found.prompts) == columns_of(expected.prompts) == ["answer", "level", "x"]
    assert found.notes == expected.notes


def write_files(folder: Path) -> str:
    """A glob of Alpaca's rows in two files, and in a third that cannot be read row by row. The ninth row is bad."""
    rows = [{"instruction": f"add {n}", "input": f"{n}", "output": f"{2 * n}", "level": n} for n in range(12)]
    rows[8]["output"] = ""
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", rows[:5])
    write_jsonl(folder / "b.jsonl", rows[5:10])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows[10:]).encode()))
    return f"{folder}/*.jsonl*"


def test_files_of_another_format_are_a_source_among_others(tmp_path: Path, request: pytest.FixtureRequest):
    few = write_jsonl(tmp_path / "few.jsonl", ROWS[:3])
    files = write_files(tmp_path / "files")
    sources = [{"path": files, "weight": 3.0}, {"path": few, "weight": 1.0}]
    expected = load(sources)
    cache = request.getfixturevalue("large")
    found = load(sources)
    stored, small = (part.samples for part in found.prompts.parts)  # type: ignore[attr-defined]
    assert isinstance(stored, StoredSamples) and isinstance(small, list)
    assert list(found.prompts) == list(expected.prompts) and list(found.experts) == list(expected.experts)
    assert [(prompt.id, prompt.reference) for prompt in stored] == [(n, str(2 * n)) for n in range(12) if n != 8]
    assert stored[-1].columns == {"input": "11", "output": "22", "level": 11} and "add 11\n11" in stored[-1].text
    assert fingerprint(found.prompts) == fingerprint(expected.prompts) and found.notes == expected.notes
    alpaca = "11 rows read as Alpaca: instruction (text), output"
    bad = f"skipped 1 unusable rows: 1 column 'output' is empty (first: {tmp_path}/files/b.jsonl line 7)"
    assert found.notes[:2] == (f"{files}: {alpaca}", f"{files}: {bad}")

    before = cursor_over(found.prompts, 7)
    before.next(5)
    state = before.state_dict()
    drawn = [found.prompts[row] for row in before.next(30)]
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("part-*")}
    again = load(sources)
    resumed = cursor_over(again.prompts, 7)
    resumed.load_state_dict(state)
    assert [again.prompts[row] for row in resumed.next(30)] == drawn
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("part-*")} == written and written
    (tmp_path / "files").rename(tmp_path / "moved")
    assert f"first: {tmp_path}/moved/b.jsonl line 7" in load(f"{tmp_path}/moved/*.jsonl*").notes[1]


@pytest.mark.parametrize(("some", "data"), [("@[1:7]", {}), ("#7", {}), ("", {"max_rows": 7})])
def test_some_rows_of_a_large_file(some: str, data: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest):
    source = write_jsonl(tmp_path / "rows.jsonl") + some
    chosen = {"dataset": source, "on_bad_row": "skip", **data}
    expected = load_run_data(DataConfig(**chosen), ChordConfig(), TOKENIZER, expert_max_length=100)
    request.getfixturevalue("large")
    found = load_run_data(DataConfig(**chosen), ChordConfig(), TOKENIZER, expert_max_length=100)
    assert isinstance(found.prompts, StoredSamples) and list(found.prompts) == expected.prompts
    assert found.notes == expected.notes and "first: line 13" in found.notes[1]


class Told(Work):
    """With all that was told of it."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "done":
            self.__dict__.setdefault("seen", []).append((self.what, self.total, value))


def test_how_far_it_is_is_told_row_by_row(tmp_path: Path, request: pytest.FixtureRequest):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"{n}?", "answer": f"{n}"} for n in range(12)])
    settings = DataConfig(dataset=source)

    def told() -> list[int]:
        work = Told()
        load_run_data(settings, ChordConfig(), TOKENIZER, expert_max_length=100, work=work)
        assert (work.what, work.total) == (f"rows of {source}", 12)
        return [done for what, _, done in work.__dict__["seen"] if what == work.what]

    assert told()[1:] == [*range(1, 13)]
    large = request.getfixturevalue("large")
    assert told()[1:] == [0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 11, 12, 12]  # three parts
    assert told()[1:] == [12, 12]
    next(large.rglob("part-00001")).unlink()  # the others are there: of another process, say
    assert told()[1:] == [7, 7, 8, 9, 10, 11, 12, 12]


def test_an_arrow_file_has_one_folder(tmp_path: Path, large: Path):
    rows = datasets.Dataset.from_list([{"prompt": f"{n}?", "answer": f"{n}"} for n in range(6)])
    rows.save_to_disk(str(tmp_path / "saved"))
    expected = load_run_data(DataConfig(dataset=str(tmp_path / "saved")), ChordConfig(), TOKENIZER, expert_max_length=9)
    again = load_run_data(DataConfig(dataset=str(tmp_path / "saved")), ChordConfig(), TOKENIZER, expert_max_length=9)
    assert isinstance(again.prompts, StoredSamples) and list(again.prompts) == list(expected.prompts)
    assert len(list(large.iterdir())) == 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.attack
@pytest.mark.parametrize(
    "damage",
    [flip, Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-1])],
)
def test_what_is_damaged_is_made_again(damage: Callable[[Path], Any], tmp_path: Path, large: Path):
    source = write_jsonl(tmp_path / "rows.jsonl")
    before = load(source)
    expected = RunData(list(before.prompts), [], list(before.experts), before.end_token_ids, before.notes)
    files = [path for path in large.rglob("*") if path.is_file() and path.name != "lock"]
    contents = {path: path.read_bytes() for path in files}
    assert len(files) == 12
    for path in files:
        damage(path)
    assert_same(load(source), expected)
    assert {path: path.read_bytes() for path in files} == contents


def test_what_samples_depend_on_has_a_folder_of_its_own(tmp_path: Path, large: Path):
    source = write_jsonl(tmp_path / "rows.jsonl")
    folders = []
    other = tokenizer_of(QWEN25)
    other.chat_template = str(other.chat_template) + "{# other #}"
    load(source)
    folders.append(len(list(large.iterdir())))
    write_jsonl(tmp_path / "moved.jsonl")
    load(str(tmp_path / "moved.jsonl"))  # the same rows elsewhere
    folders.append(len(list(large.iterdir())))
    for change in ({"system_prompt": "Add."}, {"max_prompt_length": 90}, {"reference_pattern": "(.+)"}):
        load(source, **change)
        folders.append(len(list(large.iterdir())))
    settings = DataConfig(dataset=source, max_prompt_length=100, on_bad_row="skip")
    load_run_data(settings, ChordConfig(), other, expert_max_length=100)
    folders.append(len(list(large.iterdir())))
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:-1])
    load_run_data(settings, ChordConfig(), TOKENIZER, expert_max_length=100)
    folders.append(len(list(large.iterdir())))
    assert folders == [2, 2, 4, 6, 8, 9, 10]


def test_a_bad_row_ends_the_run_with_its_line(tmp_path: Path, large: Path):
    source = write_jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(
        UserError, match=rf"^{source}:13: column 'prompt' must hold text or chat messages, not ''; mend"
    ):
        load(source, on_bad_row="stop")
    path = tmp_path / "torn.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]) + '{"prompt": \n', encoding="utf-8")
    with pytest.raises(UserError, match=r"torn\.jsonl:5: not valid JSON: Expecting value"):
        load(str(path), on_bad_row="stop")
    path.write_text("7\n" * 6, encoding="utf-8")
    with pytest.raises(UserError, match=r"none of its 6 rows can be used: 6 no JSON object \(first: line 1\); mend"):
        load(str(path))


def test_a_file_that_is_cut_short_meanwhile_is_a_sentence(tmp_path: Path, large: Path):
    source = write_jsonl(tmp_path / "rows.jsonl")
    prompts = load(source).prompts
    os.truncate(source, 1000)
    with pytest.raises(UserError, match=rf"^{source} row 23 is not what it was at the start: not valid JSON"):
        prompts[-1]


def test_nothing_is_written_for_a_small_data_set(tmp_path: Path, cache: Path):
    assert isinstance(load(write_jsonl(tmp_path / "rows.jsonl")).prompts, list)
    assert not cache.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, large: Path):
    large.parent.mkdir()
    large.write_bytes(b"in the way")
    with pytest.raises(UserError, match=rf"^{large}/[0-9a-f]{{32}} cannot be written \(.*\); mend that"):
        load(write_jsonl(tmp_path / "rows.jsonl"))


def test_rows_of_an_earlier_start_were_there_before(tmp_path: Path):
    """They count as done, and not as what this start has done."""
    take_part(tmp_path, 0, tmp_path / "log")
    for part in (2, 5, 7):
        (tmp_path / f"part-{part:05}").unlink()
    work, seen = Work("rows", 0, 8 * 1024), []

    def make(indices: range) -> tuple[list[ExpertSample], Tally]:
        seen.append((work.before, work.done))
        return made(indices, 0, tmp_path / "log")

    stored_samples(tmp_path, 8 * 1024, ExpertSample, make, lambda fields: ExpertSample(**fields), work)
    assert seen == [(5 * 1024, 5 * 1024), (5 * 1024, 6 * 1024), (5 * 1024, 7 * 1024)]
    assert work == Work("rows", 8 * 1024, 8 * 1024, before=5 * 1024)


# several processes


def made(indices: range, seconds: float, log: Path) -> tuple[list[ExpertSample], Tally]:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {indices.start}\n")
    time.sleep(seconds)
    return [ExpertSample(index, (index, 1), 1) for index in indices], Tally(usable=len(indices))


def take_part(folder: Path, seconds: float, log: Path) -> StoredSamples[ExpertSample]:
    samples, tallies = stored_samples(
        folder,
        8 * 1024,
        ExpertSample,
        lambda indices: made(indices, seconds, log),
        lambda fields: ExpertSample(**fields),
        Work(),
    )
    assert sum(tally.usable for tally in tallies) == len(samples) == 8 * 1024
    return samples


def check_part(folder: Path, log: Path, answers: Any, together: Any) -> None:
    together.wait()
    samples = take_part(folder, 0.1, log)
    answers.put((samples.fingerprint, samples[5000]))


@pytest.mark.attack
def test_processes_share_the_work_and_all_have_the_whole(tmp_path: Path):
    answers, together = fork.SimpleQueue(), fork.Barrier(4)
    log = tmp_path / "log"
    processes = [fork.Process(target=check_part, args=(tmp_path / "cache", log, answers, together)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {answers.get() for _ in processes}
    for process in processes:
        process.join()
    expected = fingerprint([ExpertSample(index, (index, 1), 1) for index in range(8 * 1024)])
    assert found == {(expected, ExpertSample(5000, (5000, 1), 1))}
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(start) for _, start in lines) == [1024 * part for part in range(8)]  # each once
    assert len({process for process, _ in lines}) > 1


@pytest.mark.attack
def test_what_a_killed_process_was_making_is_made_by_another(tmp_path: Path):
    log = tmp_path / "log"
    log.touch()
    process = fork.Process(target=take_part, args=(tmp_path / "cache", 3600.0, log))
    process.start()
    while not log.read_text():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]
    samples = take_part(tmp_path / "cache", 0.0, log)
    assert samples[0] == ExpertSample(0, (0, 1), 1) and len(samples) == 8 * 1024
    assert len(list((tmp_path / "cache").iterdir())) == 10


def test_mapped_files_are_not_held_open(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    samples = take_part(tmp_path / "cache", 0.0, tmp_path / "log")
    assert len(os.listdir("/proc/self/fd")) == before
    assert samples[-1].id == 8 * 1024 - 1
