"""What a row asks: text or chat messages, and the columns beside them that change the prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chord_megatron.data.bad_rows import BadRow
from chord_megatron.data.formats import FINAL, Keys, Reading, read_row
from chord_megatron.data.messages import (
    Message,
    loss_weights,
    messages_in_text,
    read_messages,
    without_flags,
    without_nulls,
)
from chord_megatron.data.sources import Row
from chord_megatron.system.sentences import shown

_MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
_SYSTEM_COLUMNS = ("system", "system_prompt")


@dataclass(frozen=True)
class Conversation:
    """A question, and what belongs to it."""

    column: str  # that holds the question
    kind: str  # how the column was read
    question: str | list[Message]  # not empty, but for a text of its own; text is one message of the user's
    answer: Message | None = None  # the final assistant message of a whole conversation
    answer_weight: float = 1.0  # in the loss, of the final answer
    learnt: tuple[tuple[int, float], ...] = ()  # messages of the question that are learnt, too, and what they weigh
    system: str | None = None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # for the chat template, of this row
    format: str = ""  # whose rows these are
    other: str = "answer"  # the column of the reference, or of the expert's answer; or FINAL

    @property
    def begun(self) -> str:
        """How far the question has written the model's turn: the text of an assistant's message at its end."""
        if isinstance(self.question, str) or self.question[-1]["role"] != "assistant":
            return ""
        return str(self.question[-1].get("content") or "")

    @property
    def read_as(self) -> str:
        """What the row was taken for."""
        return f"{self.format}: {self.column} ({self.kind}), {self.other}"

    @property
    def columns(self) -> tuple[str, ...]:
        """What of the row was used beside its question."""
        used = {
            "system": self.system,
            "tools": self.tools,
            "chat_template_kwargs": self.template_kwargs,
            "answers of earlier turns": self.learnt,
        }
        return tuple(name for name, value in used.items() if value)


def read_conversation(row: Row, keys: Keys) -> Conversation:
    """What a row asks, and by which column it is answered. Raises BadRow."""
    label, reading, other = read_row(row, keys)
    _refuse_columns(row, reading)
    if reading.is_text and not keys.is_expert:
        raise BadRow(f"column {reading.column!r} is a text without a question", f"; name one in {keys.question[0]}")
    question, kind = _read_question(reading)
    answer, weights = None, [1.0]
    if isinstance(question, list):
        weights = loss_weights(question, reading.column)
        question = [without_flags(message) for message in question]
        if reading.is_whole and question[-1]["role"] == "assistant":
            *question, answer = question
            if not question:
                raise BadRow(f"column {reading.column!r} has nothing before the assistant message")
    return Conversation(
        column=reading.column,
        kind=kind,
        question=question,
        answer=answer,
        answer_weight=1.0 if answer is None or other != FINAL else weights[-1],
        learnt=tuple((index, weight) for index, weight in enumerate(weights[:-1]) if weight),
        system=_read_system(row, question),
        tools=_read_tools(row.get("tools")),
        template_kwargs={**(reading.template_kwargs or {}), **_read_template_kwargs(row.get("chat_template_kwargs"))},
        format=label,
        other=other,
    )


def _read_question(reading: Reading) -> tuple[str | list[Message], str]:
    """And how the column was read."""
    value, column = reading.question, reading.column
    if reading.is_text:
        return "", "a text of its own"
    if isinstance(value, list):
        return read_messages(value, column), "chat messages"
    if isinstance(value, str) and (reading.is_whole or messages_in_text(value, column)):
        return read_messages(value, column), "chat messages in JSON text"
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"column {column!r} must hold text or chat messages", f", not {shown(value)}")
    return value, "text"


def _refuse_columns(row: Row, reading: Reading) -> None:
    """Columns that change what is asked, and that no prompt here would hold."""
    for name in _MEDIA_COLUMNS:
        if row.get(name):
            raise BadRow(f"column {name!r}", " changes what is asked, and only text is read; leave such rows out")
    if isinstance(row.get("history"), list) and row["history"] and "history" not in reading.joined:  # ms-swift's
        raise BadRow("column 'history' holds earlier turns", "; give the conversation as chat messages")
    if reading.column == "instruction" and row.get("input") and "input" not in reading.joined:  # Alpaca's
        raise BadRow("column 'input' belongs to the column 'instruction'", "; join both in one column")


def _read_system(row: Row, question: str | list[Message]) -> str | None:
    column = next((name for name in _SYSTEM_COLUMNS if row.get(name) not in (None, "")), None)
    if column is None:
        return None
    system = row[column]
    if not isinstance(system, str):
        raise BadRow(f"column {column!r} must hold text", f", not {shown(system)}")
    if isinstance(question, list) and question[0]["role"] == "system":
        if question[0].get("content") == system:
            return None
        raise BadRow(f"column {column!r} and a system message in the conversation differ", "; keep one of them")
    return system


def _read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tool definitions, or the JSON text of them, as ms-swift has it."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadRow("column 'tools' is no JSON list of objects", f": {shown(tools)}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("column 'tools' is no JSON list of objects", f": {shown(tools)}")
    return [without_nulls(tool) for tool in tools]


def _read_template_kwargs(kwargs: Any) -> dict[str, Any]:
    """TRL's column of a row's own arguments for the template."""
    if not kwargs:
        return {}
    if not isinstance(kwargs, Mapping):
        raise BadRow("column 'chat_template_kwargs' must hold an object", f", not {shown(kwargs)}")
    read: dict[str, Any] = without_nulls(kwargs)
    return read
