"""What a row asks: text or chat messages, and the columns beside them that change the prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from chord_megatron.data.bad_rows import BadRow
from chord_megatron.data.columns import read_column, read_weight
from chord_megatron.data.sources import Row
from chord_megatron.system.sentences import shown

Message: TypeAlias = dict[str, Any]

MESSAGES_COLUMN = "messages"  # ms-swift's rows: the whole conversation in one column
_MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
_LOOKS_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(['"])(role|content)\1\s*:""")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant"}
_LOSS_FLAGS = ("loss", "loss_scale", "step_loss_mask")  # of ms-swift and slime, on a message


@dataclass(frozen=True)
class Conversation:
    """A question, and what belongs to it."""

    column: str  # that holds the question
    kind: str  # how the column was read
    question: str | list[Message]  # not empty; text is one message of the user's
    answer: Message | None = None  # the final assistant message of the column `messages`
    answer_weight: float = 1.0  # its `loss_scale`
    system: str | None = None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # for the chat template, of this row

    @property
    def begun(self) -> str:
        """How far the question has written the model's turn: the text of an assistant's message at its end."""
        if isinstance(self.question, str) or self.question[-1]["role"] != "assistant":
            return ""
        return str(self.question[-1].get("content") or "")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the row that were used beside the question's."""
        used = {"system": self.system, "tools": self.tools, "chat_template_kwargs": self.template_kwargs}
        return tuple(name for name, value in used.items() if value)


def read_conversation(row: Row, prompt_column: str) -> Conversation:
    """A row without `prompt_column` may have `messages`. Raises BadRow."""
    _refuse_columns(row, prompt_column)
    column = prompt_column if prompt_column in row or MESSAGES_COLUMN not in row else MESSAGES_COLUMN
    question = read_column(row, column)
    kind, messages = "text", question
    if isinstance(question, str) and (messages := _messages_in_text(question)):
        question, kind = _read_messages(messages, column), "chat messages in JSON text"
    elif isinstance(question, str) and _LOOKS_LIKE_MESSAGES.match(question):
        raise BadRow(f"column {column!r} holds chat messages as text that is not JSON", f": {shown(question)}")
    elif isinstance(question, list):
        question, kind = _read_messages(question, column), "chat messages"
    elif not isinstance(question, str) or not question.strip():
        raise BadRow(f"column {column!r} must hold text or chat messages", f", not {shown(question)}")
    answer, answer_weight = None, 1.0
    if column == MESSAGES_COLUMN and isinstance(question, list) and question[-1]["role"] == "assistant":
        *question, answer = question
        answer_weight = _answer_weight(messages[-1], column)
        if not question:
            raise BadRow(f"column {column!r} has nothing before the assistant message")
    return Conversation(
        column=column,
        kind=kind,
        question=question,
        answer=answer,
        answer_weight=answer_weight,
        system=_read_system(row, question),
        tools=_read_tools(row.get("tools")),
        template_kwargs=_read_template_kwargs(row.get("chat_template_kwargs")),
    )


def _refuse_columns(row: Row, prompt_column: str) -> None:
    """Columns that change what is asked, and that no prompt here would hold."""
    for name in _MEDIA_COLUMNS:
        if row.get(name):
            raise BadRow(f"column {name!r}", " changes what is asked, and only text is read; leave such rows out")
    if isinstance(row.get("history"), list) and row["history"]:  # ms-swift's, of earlier turns
        raise BadRow("column 'history' holds earlier turns", "; give the conversation as chat messages")
    if prompt_column == "instruction" and row.get("input"):  # Alpaca's
        raise BadRow("column 'input' belongs to the column 'instruction'", "; join both in one column")


def without_nulls(value: Any) -> Any:
    """Parquet and `datasets` fill the keys that other rows have with null; templates ask whether a key is there."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _messages_in_text(text: str) -> list[Any] | None:
    """Messages that were written as JSON, as a table without nested columns holds them."""
    if not text.lstrip().startswith("[") or '"role"' not in text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_chat = isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value)
    return value if is_chat else None


def _read_messages(messages: list[Any], column: str) -> list[Message]:
    if not messages:
        raise BadRow(f"column {column!r} holds no messages")
    read = [_read_message(message, f"message {index}", column) for index, message in enumerate(messages)]
    *earlier, final = read
    for index, message in enumerate(earlier):
        if flag := _flag(message, True):
            raise BadRow(
                f"column {column!r} trains an assistant's message that is not the last",
                f", by the flag {flag!r} of message {index}; make it a row of its own, which ends there",
            )
    if flag := _flag(final, False):
        raise BadRow(
            f"column {column!r} leaves its final answer out of the loss", f", by the flag {flag!r}; leave such rows out"
        )
    return [{key: value for key, value in message.items() if key not in _LOSS_FLAGS} for message in read]


def _flag(message: Message, trains: bool) -> str | None:
    """The flag by which an assistant's message is trained, or is not."""
    flags = _LOSS_FLAGS if message["role"] == "assistant" else ()
    return next((flag for flag in flags if flag in message and bool(message[flag]) is trains), None)


def _answer_weight(message: Message, column: str) -> float:
    scale = message.get("loss_scale")
    return 1.0 if scale is None else read_weight(scale, f"column {column!r}: the 'loss_scale' of its final answer")


def _read_message(message: Any, place: str, column: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRow(f"column {column!r} needs messages of 'role' and 'content'", f"; {place} is {shown(message)}")
    read: Message = without_nulls(message)
    if "content" in message:
        read.setdefault("content", None)  # beside a tool call, which some templates tell by it
    role = read["role"]
    usual = _ROLES.get(role.strip().lower(), role.strip().lower())
    if role != usual:
        raise BadRow(f"column {column!r} has the role {role!r}", f" in {place}, which templates call {usual!r}")
    content = read.get("content")
    if isinstance(content, list):
        read["content"] = content = _joined(content, place, column)
    if not isinstance(content, str) and not (content is None and read.get("tool_calls")):
        raise BadRow(
            f"column {column!r} needs messages of 'role' and 'content'",
            f"; {place} has no text as its 'content': {shown(message)}",
        )
    return read


def _joined(parts: list[Any], place: str, column: str) -> str:
    """Content in parts, as multimodal templates take it, where every part is text."""
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise BadRow(f"column {column!r} holds content that is not text", f": {place} has a part {shown(kind)}")
    return "".join(part["text"] for part in parts)


def _read_system(row: Row, question: str | list[Message]) -> str | None:
    system = row.get("system")
    if system is None or system == "":
        return None
    if not isinstance(system, str):
        raise BadRow("column 'system' must hold text", f", not {shown(system)}")
    if isinstance(question, list) and question[0]["role"] == "system":
        if question[0].get("content") == system:
            return None
        raise BadRow("column 'system' and a system message in the conversation differ", "; keep one of them")
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
