"""Damaged bytes in data sets and chat templates: they are read, or one sentence says what is wrong."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from mutations import check_damaged

from chord_megatron.config import ChordConfig, DataConfig
from chord_megatron.data.load import load_run_data
from chord_megatron.system.errors import UserError
from tests.unit.chat_templates import LLAMA31, MISTRAL, QWEN3, QWEN25, R1_DISTILL, ChatModel, tokenizer_of

pytestmark = pytest.mark.attack

CHAT = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\nIt is 2"},
]
ROWS: list[dict[str, Any]] = [
    {"messages": CHAT, "answer": "2", "tools": [{"type": "function", "function": {"name": "add"}}]},
    {"messages": json.dumps(CHAT[1:2] + CHAT[4:]), "answer": 2.5, "system": "Add.", "level": [1, None]},
    {"prompt": "1+2?", "answer": "3", "chat_template_kwargs": {"enable_thinking": False}},
]
FORMATS = Path(__file__).parents[1] / "data" / "formats"
SYSTEMS: list[dict[str, Any]] = [
    json.loads(path.read_text().splitlines()[-1])
    for name in ("ms_swift_agent", "ms_swift_query", "alpaca", "sharegpt", "slime_turns", "trl", "roll", "roll")
    for path in [FORMATS / f"{name}.jsonl"]
]
TOKENIZER = tokenizer_of(QWEN25)
EXAMPLES = 60


def failure(source: Path, tokenizer: Any = TOKENIZER, **data: Any) -> str | None:
    """What loading raises that is not one sentence for the user."""
    settings = DataConfig(dataset=str(source), max_prompt_length=10_000, **data)
    try:
        load_run_data(settings, ChordConfig(chord_sft_dataset=str(source)), tokenizer, expert_max_length=10_000)
    except UserError as error:
        return None if str(error).strip() and "\n" not in str(error) else f"no sentence: {error!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return None


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_parquet(path: Path) -> None:
    datasets.Dataset.from_list([{"prompt": CHAT[:2], "answer": "2", "level": 1}] * 3).to_parquet(str(path))


def write_list(path: Path) -> None:
    path.write_text(json.dumps(SYSTEMS))


def write_csv(path: Path) -> None:
    lines = [["messages", "ground_truth"], *([row["messages"], row["ground_truth"]] for row in SYSTEMS[-2:])]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in SYSTEMS).encode(), mtime=0))


def write_zstd(path: Path) -> None:
    with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(path), "wb"), "zstd") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in SYSTEMS).encode())


def write_arrow(path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"prompt": CHAT[:2], "answer": "2", "level": 1}] * 3)
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


FILES = [
    ("jsonl", write_jsonl, 120),
    ("json", write_list, 120),
    ("csv", write_csv, 120),
    ("jsonl.gz", write_gzip, 40),
    ("jsonl.zst", write_zstd, 40),
    ("parquet", write_parquet, 40),
    ("arrow", write_arrow, 120),
]


@pytest.mark.parametrize("action", ["stop", "skip"])
@pytest.mark.parametrize(("name", "write", "count"), FILES)
def test_damaged_rows(
    tmp_path: Path,
    monkeypatch,
    name: str,
    write: Callable[[Path], None],
    count: int,
    action: str,
    measure: Callable[[str, int], None],
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    whole = tmp_path / f"whole.{name}"
    write(whole)
    load_run_data(DataConfig(dataset=str(whole)), ChordConfig(), TOKENIZER, expert_max_length=1)
    number = itertools.count()

    def check(damaged: bytes) -> None:
        path = tmp_path / f"{next(number)}.{name}"  # of its own: `datasets` caches by name and time
        path.write_bytes(damaged)
        assert failure(path, on_bad_row=action) is None

    measure("inputs mutated", check_damaged(whole.read_bytes(), count, check))


@pytest.mark.parametrize(
    "model", [QWEN25, QWEN3, LLAMA31, MISTRAL, R1_DISTILL], ids=["Qwen2.5", "Qwen3", "Llama 3.1", "Mistral", "R1"]
)
def test_damaged_templates(tmp_path: Path, model: ChatModel, measure: Callable[[str, int], None]):
    write_jsonl(tmp_path / "rows.jsonl")
    tokenizer = tokenizer_of(model)

    def check(damaged: bytes) -> None:
        tokenizer.chat_template = damaged.decode(errors="replace")
        for action in ("stop", "skip"):
            assert failure(tmp_path / "rows.jsonl", tokenizer, on_bad_row=action) is None

    measure("inputs mutated", check_damaged(model.template.encode(), EXAMPLES, check))
