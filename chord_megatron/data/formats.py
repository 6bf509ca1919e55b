"""Whose rows these are: what of a row is the question, the reference and an expert's answer.

A format is a row of FORMATS and a function that reads a row as that system does, or says that it is none of its. Rows
are recognised one by one. Where several formats fit, they have to agree; where they do not, the row is refused with
both readings: a row that is read differently than it was meant is worse than one that is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from chord_megatron.config import ChordConfig, DataConfig
from chord_megatron.data.bad_rows import BadRow
from chord_megatron.data.columns import read_column
from chord_megatron.data.messages import messages_in_text
from chord_megatron.data.sources import Row

FINAL = "final assistant message"  # in place of a column
# The columns that systems call the reference by: of ms-swift, TRL, ROLL, slime and AReaL.
REFERENCES = ("answer", "solution", "ground_truth", "label")
# Columns beside `messages` that nobody compares with; any other may be the reference that is to be named.
_BESIDE = {
    "system", "system_prompt", "tools", "chat_template_kwargs", "enable_thinking", "id", "index", "source",
    "dataset", "task_name", "data_source",
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What a row says, as one format has it."""

    column: str  # of the question
    question: Any  # text, messages, or the JSON text of messages
    references: tuple[str, ...]  # columns, of which one has the reference, or FINAL
    answers: tuple[str, ...]  # of which one has the expert's answer, or FINAL
    is_whole: bool = False  # the question is a conversation, and its final assistant message the answer to it
    is_text: bool = False  # there is no question: the answer is a text of its own
    joined: tuple[str, ...] = ()  # further columns that the question was made of
    template_kwargs: Mapping[str, Any] | None = None

    def asks(self, column: str) -> bool:
        """Whether the question is in this column."""
        return self.column == column and not self.is_text


class Format(NamedTuple):
    """How one system writes rows."""

    label: str
    columns: str  # that it is recognised by, for people
    read: Callable[[Row], Reading | None]
    rank: Literal["marked", "asked", ""]  # marked: by columns that no other has; "": asked for by name alone


class Keys(NamedTuple):
    """The keys of the configuration for a data set: their names, and what they say (None: what the format says)."""

    format: tuple[str, str]
    question: tuple[str, str | None]
    other: tuple[str, str | None]  # the reference, or the expert's answer
    is_expert: bool


def prompt_keys(data: DataConfig) -> Keys:
    """Of data.dataset and data.eval_dataset."""
    return Keys(
        ("data.format", data.format),
        ("data.prompt_column", data.prompt_column),
        ("data.reference_column", data.reference_column),
        is_expert=False,
    )


def expert_keys(chord: ChordConfig) -> Keys:
    """Of chord.chord_sft_dataset."""
    return Keys(
        ("chord.chord_sft_format", chord.chord_sft_format),
        ("chord.chord_sft_prompt_column", chord.chord_sft_prompt_column),
        ("chord.chord_sft_answer_column", chord.chord_sft_answer_column),
        is_expert=True,
    )


def read_row(row: Row, keys: Keys) -> tuple[str, Reading, str]:
    """The label of the row's format, its reading, and the column of the reference or of the expert's answer.

    Columns that the configuration names win over the format's. Raises BadRow.
    """
    (question_key, named_question), (other_key, named_other) = keys.question, keys.other
    readings = _readings(row, keys.format)
    if named_question is not None:
        value = read_column(row, named_question, question_key)
        readings = {name: each for name, each in readings.items() if each.asks(named_question)}
        readings = readings or {"": Reading(named_question, value, _references(row), ("answer",))}
    elif not readings:
        value = read_column(row, "prompt", question_key)
        readings = {"plain": Reading("prompt", value, _references(row), ("answer",))}
    if len({(each.column, each.is_whole) for each in readings.values()}) > 1:
        raise BadRow(
            f"columns {_named({each.column for each in readings.values()})} may each be the question",
            f"; name one in {question_key}, or set {keys.format[0]} to one of {', '.join(readings)}",
        )
    name, reading = next(iter(readings.items()))
    label = FORMATS[name].label if name else "columns of the configuration"
    if named_other is not None:
        read_column(row, named_other, other_key)
        return label, reading, named_other
    return label, reading, _other(row, list(readings.values()), keys)


def _other(row: Row, readings: list[Reading], keys: Keys) -> str:
    """The column of the reference or of the expert's answer. Raises BadRow where none is there, or several differ."""
    what = "expert's answer" if keys.is_expert else "reference"
    names = dict.fromkeys(name for each in readings for name in (each.answers if keys.is_expert else each.references))
    different = {repr(read_column(row, name, keys.other[0])) if name != FINAL else FINAL: name for name in names}
    if len(different) > 1:
        raise BadRow(f"columns {_named(names)} may each be the {what}", f"; name one in {keys.other[0]}")
    return next(iter(names)) if names else _missing(row, keys)


def _missing(row: Row, keys: Keys) -> str:
    read_column(row, "answer", keys.other[0])  # raises, where it is not there
    return "answer"


def _named(names: Any) -> str:
    return " and ".join(map(repr, sorted(names)))


def _readings(row: Row, chosen: tuple[str, str]) -> dict[str, Reading]:
    """Of the formats that the row has; those with marks of their own decide. Raises BadRow."""
    key, name = chosen
    if name != "auto":
        reading = FORMATS[name].read(row)
        if reading is None:
            there = ", ".join(map(repr, row))
            raise BadRow(f"{key}={name}: no row of that format", f", which has {FORMATS[name].columns}; it has {there}")
        return {name: reading}
    read = {name: each.read(row) for name, each in FORMATS.items() if each.rank}
    found = {name: reading for name, reading in read.items() if reading is not None}
    marked = {name: reading for name, reading in found.items() if FORMATS[name].rank == "marked"}
    return marked or found


def _has(row: Row, *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def _references(row: Row) -> tuple[str, ...]:
    return tuple(name for name in REFERENCES if _has(row, name))


def _gold(row: Row, column: str) -> tuple[str, ...]:
    """The columns of the reference; where there is no column that might be it, the conversation's own last answer."""
    others = {name for name in row if _has(row, name)} - _BESIDE - {column}
    return _references(row) or (() if others else (FINAL,))


def _messages(row: Row) -> Reading | None:
    if not isinstance(row.get("messages"), (list, str)):
        return None
    return Reading("messages", row["messages"], _gold(row, "messages"), (FINAL,), is_whole=True)


def _plain(row: Row) -> Reading | None:
    if not _has(row, "prompt") or isinstance(row.get("completion"), list):
        return None
    return Reading("prompt", row["prompt"], _references(row), _plain_answers(row))


def _verl(row: Row) -> Reading | None:
    model = row.get("reward_model")
    if not (_has(row, "prompt") and isinstance(model, Mapping) and model.get("ground_truth") is not None):
        return None
    return Reading("prompt", row["prompt"], ("reward_model.ground_truth",), _plain_answers(row))


def _plain_answers(row: Row) -> tuple[str, ...]:
    return ("answer",) if _has(row, "answer") else ()


def _verl_sft(row: Row) -> Reading | None:
    reading = _messages(row)
    if reading is None or not isinstance(row.get("enable_thinking"), bool):
        return None
    return replace(reading, template_kwargs={"enable_thinking": row["enable_thinking"]})


def _slime(row: Row) -> Reading | None:
    if not _has(row, "label"):
        return None
    column = next((name for name in ("input", "prompt", "messages") if _has(row, name)), None)
    if column is None:
        return None
    is_whole = column == "messages"
    return Reading(column, row[column], ("label",), (FINAL,) if is_whole else _plain_answers(row), is_whole)


def _input_output(row: Row) -> Reading | None:
    if not _has(row, "input", "output") or _has(row, "instruction"):
        return None
    return Reading("input", row["input"], ("output",), ("output",))


def _final(row: Row) -> Reading | None:
    """Messages whose last answer is the reference, whatever else is there."""
    reading = _messages(row)
    return reading and replace(reading, references=_references(row) or (FINAL,))


def _nemo_rl(row: Row) -> Reading | None:
    return _final(row) or _input_output(row)


def _completion(row: Row) -> Reading | None:
    if not _has(row, "prompt", "completion"):
        return None
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, list):  # messages, that all are the model's turn
        begin = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        learnt = [_learnt(message) if len(completion) > 1 else message for message in completion]
        return Reading("prompt", [*begin, *learnt], _references(row) or (FINAL,), (FINAL,), is_whole=True)
    return Reading("prompt", prompt, _references(row) or ("completion",), ("completion",))


def _learnt(message: Any) -> Any:
    is_spoken = isinstance(message, Mapping) and message.get("role") == "assistant"
    return {"loss": True, **message} if is_spoken else message


def _text(row: Row) -> Reading | None:
    asks = any(_has(row, name) for name in ("prompt", "messages", "input", "instruction", "query", "conversations"))
    if asks or not isinstance(row.get("text"), str):
        return None
    return Reading("text", row["text"], (), ("text",), is_text=True)


def _trl(row: Row) -> Reading | None:
    return _completion(row) or _plain(row) or _messages(row) or _text(row)


def _prime_rl(row: Row) -> Reading | None:
    return _final(row) or _completion(row)


def _trinity(row: Row) -> Reading | None:
    if not _has(row, "prompt", "response"):
        return None
    return Reading("prompt", row["prompt"], _references(row) or ("response",), ("response",))


def _roll(row: Row) -> Reading | None:
    messages = row.get("messages")
    if not isinstance(messages, str) or messages_in_text(messages, "messages") is None:
        return None
    if not any(_has(row, name) for name in ("ground_truth", "tag", "test_cases")):
        return None
    references = ("ground_truth",) if _has(row, "ground_truth") else _references(row)
    return Reading("messages", messages, references, (FINAL,), is_whole=True)


def _conversations(row: Row) -> Reading | None:
    column = next((name for name in ("conversations", "conversation") if _has(row, name)), None)
    if column is None or not isinstance(row[column], (list, str)):
        return None
    return Reading(column, row[column], _gold(row, column), (FINAL,), is_whole=True)


def _query(row: Row) -> Reading | None:
    if not isinstance(row.get("query"), str) or not (_has(row, "response") or _references(row)):
        return None
    question: Any = row["query"]
    if row.get("history"):
        question = [*_earlier(row["history"]), {"role": "user", "content": question}]
    response = ("response",) if _has(row, "response") else ()
    return Reading("query", question, _references(row) or response, response, joined=("history",))


def _earlier(history: Any) -> Iterator[dict[str, Any]]:
    """[[question, answer], ...] of earlier turns. Raises BadRow."""
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("column 'history' must hold pairs of a question and its answer")
        yield {"role": "user", "content": pair[0]}
        yield {"role": "assistant", "content": pair[1]}


def _alpaca(row: Row) -> Reading | None:
    if not isinstance(row.get("instruction"), str) or not _has(row, "output"):
        return None
    parts = [part for part in (row["instruction"], row.get("input")) if part]
    question: Any = "\n".join(map(str, parts))
    if row.get("history"):
        question = [*_earlier(row["history"]), {"role": "user", "content": question}]
    joined = ("input", "history")
    return Reading("instruction", question, _references(row) or ("output",), ("output",), joined=joined)


def _ms_swift(row: Row) -> Reading | None:
    return _messages(row) or _conversations(row) or _alpaca(row) or _query(row)


FORMATS = {
    "verl": Format("verl RL", "prompt and reward_model.ground_truth", _verl, "marked"),
    "verl_sft": Format("verl SFT", "messages and enable_thinking", _verl_sft, "marked"),
    "roll": Format("ROLL", "messages as JSON text, with ground_truth, tag or test_cases", _roll, "marked"),
    "sharegpt": Format("ShareGPT", "conversations or conversation", _conversations, "marked"),
    "alpaca": Format("Alpaca", "instruction and output", _alpaca, "marked"),
    "query": Format("ms-swift", "query and response", _query, "marked"),
    "slime": Format("slime", "input, prompt or messages, and label", _slime, "asked"),
    "trinity": Format("Trinity", "prompt and response", _trinity, "asked"),
    "completion": Format("TRL", "prompt and completion", _completion, "asked"),
    "text": Format("TRL", "text alone", _text, "asked"),
    "input_output": Format("NeMo-RL", "input and output", _input_output, "asked"),
    "plain": Format("plain rows", "prompt", _plain, "asked"),
    "messages": Format("messages", "messages", _messages, "asked"),
    # Systems whose rows are recognised as one of the above.
    "ms_swift": Format("ms-swift", "messages, conversations, query or instruction", _ms_swift, ""),
    "trl": Format("TRL", "prompt, prompt and completion, messages, or text", _trl, ""),
    "nemo_rl": Format("NeMo-RL", "messages, or input and output", _nemo_rl, ""),
    "prime_rl": Format("prime-rl", "messages, or prompt and completion", _prime_rl, ""),
    "areal": Format("AReaL", "messages", _messages, ""),
}
