"""Chat messages: one form for what ms-swift, ShareGPT and others write, and what of them is learnt."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from chord_megatron.data.bad_rows import BadRow
from chord_megatron.data.columns import read_weight
from chord_megatron.system.sentences import shown

Message: TypeAlias = dict[str, Any]

_LOOKS_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(['"])(role|content|from|value)\1\s*:""")
# ms-swift's and ShareGPT's names of roles, which templates do not know (ms-swift: MessagesPreprocessor).
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "tool_response": "tool", "observation": "tool"}
_CALLS = ("tool_call", "function_call")  # messages of ms-swift whose text is one call of a tool
_MISSPELT = {"chatbot": "assistant", "model": "assistant"}
_PAIR = ("system", "user", "human", "tool", "assistant", "gpt", "bot")  # [{human: ..., assistant: ...}], in that order
LOSS_FLAGS = ("loss", "loss_scale", "step_loss_mask")  # of ms-swift and slime, on a message


def messages_in_text(text: str, column: str) -> list[Any] | None:
    """Messages that were written as JSON, as a table without nested columns holds them; None where it is other text.

    Raises BadRow for a text that only looks like them.
    """
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if _LOOKS_LIKE_MESSAGES.match(text):
            raise BadRow(
                f"column {column!r} holds chat messages as text that is not JSON", f": {shown(text)}"
            ) from None
        return None
    is_chat = isinstance(value, list) and value and all(isinstance(item, dict) and _is_message(item) for item in value)
    return value if is_chat else None


def _is_message(item: dict[str, Any]) -> bool:
    return "role" in item or "from" in item or ("assistant" in item and set(item) <= {*_PAIR, *LOSS_FLAGS})


def read_messages(value: Any, column: str) -> list[Message]:
    """Messages of 'role' and 'content', as templates take them; flags of the loss stay on them. Raises BadRow."""
    messages = messages_in_text(value, column) if isinstance(value, str) else value
    if not isinstance(messages, list):
        raise BadRow(f"column {column!r} must hold chat messages", f", not {shown(value)}")
    if not messages:
        raise BadRow(f"column {column!r} holds no messages")
    read: list[Message] = []
    for index, item in enumerate(_unpaired(messages)):
        message = _read_message(item, f"message {index}", column)
        goes_on = bool(read) and read[-1]["role"] == "assistant" and isinstance(item, Mapping)
        if goes_on and _role(item) in _CALLS:  # of one turn with what the assistant said before
            begun = read.pop()
            calls = [*begun.get("tool_calls", ()), *message["tool_calls"]]
            message = {**begun, **message, "content": begun.get("content"), "tool_calls": calls}
        read.append(message)
    return read


def without_flags(message: Message) -> Message:
    """As templates read it."""
    return {key: value for key, value in message.items() if key not in LOSS_FLAGS}


def loss_weights(messages: list[Message], column: str) -> list[float]:
    """What each message weighs in the loss: 0, or for one of the assistant's that is learnt its `loss_scale`.

    Without flags the last one is learnt, at the end. Where one before that has a flag, each is learnt that is not
    flagged out, as in ms-swift and slime (`step_loss_mask` is 1 by default). Raises BadRow.
    """
    final = len(messages) - 1
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    is_by_turn = any(flag in messages[index] for index in spoken if index < final for flag in LOSS_FLAGS)
    weights = [0.0] * len(messages)
    for index in spoken:
        if is_by_turn or index == final:
            weights[index] = _weight(messages[index], f"column {column!r}", index == final)
    return weights


def _weight(message: Message, where: str, is_final: bool) -> float:
    whose = "its final answer" if is_final else "an answer"
    for flag in ("loss", "step_loss_mask"):
        if flag in message and message[flag] not in (0, 1):
            raise BadRow(f"{where}: the flag {flag!r} of {whose} is not true or false", f": {shown(message[flag])}")
    if not (message.get("loss", True) and message.get("step_loss_mask", True)):
        return 0.0
    return read_weight(message.get("loss_scale", 1), f"{where}: the 'loss_scale' of {whose}")


def without_nulls(value: Any) -> Any:
    """Parquet and `datasets` fill the keys that other rows have with null; templates ask whether a key is there."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _unpaired(messages: list[Any]) -> Iterator[Any]:
    """ms-swift's [{human, assistant}]: the messages of each pair."""
    for item in messages:
        if isinstance(item, Mapping) and "role" not in item and "from" not in item and _is_message(without_nulls(item)):
            flags = {key: item[key] for key in LOSS_FLAGS if key in item}
            for role in _PAIR:
                if item.get(role) is not None:
                    is_learnt = _ROLES.get(role, role) == "assistant"
                    yield {"role": role, "content": item[role], **(flags if is_learnt else {})}
        else:
            yield item


def _role(message: Mapping[str, Any]) -> Any:
    return message.get("role") if message.get("role") is not None else message.get("from")


def _read_message(message: Any, place: str, column: str) -> Message:
    role = _role(message) if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or not isinstance(role, str):
        raise BadRow(f"column {column!r} needs messages of 'role' and 'content'", f"; {place} is {shown(message)}")
    read: Message = without_nulls({key: item for key, item in message.items() if key not in ("from", "value")})
    content = message.get("content", message.get("value"))
    if "content" in message or "value" in message:
        read["content"] = without_nulls(content)  # null beside a tool call, which some templates tell by it
    read["role"] = _usual_role(role, place, column)
    if role in _CALLS:
        return {**read, "content": None, "tool_calls": _calls(content, place, column)}
    if isinstance(content, list):
        read["content"] = content = _joined(content, place, column)
    if not isinstance(content, str) and not (content is None and read.get("tool_calls")):
        raise BadRow(
            f"column {column!r} needs messages of 'role' and 'content'",
            f"; {place} has no text as its 'content': {shown(message)}",
        )
    return read


def _usual_role(role: str, place: str, column: str) -> str:
    if role in _CALLS:
        return "assistant"
    if role in _ROLES:
        return _ROLES[role]
    plain = role.strip().lower()
    usual = _MISSPELT.get(plain) or _ROLES.get(plain, plain)
    if role != usual:
        raise BadRow(f"column {column!r} has the role {role!r}", f" in {place}, which templates call {usual!r}")
    return role


def _calls(content: Any, place: str, column: str) -> list[dict[str, Any]]:
    """ms-swift writes a call as the JSON text of its name and arguments."""
    try:
        value = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        value = None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise BadRow(
            f"column {column!r} has a call of a tool that is no JSON object of 'name' and 'arguments'",
            f": {place} is {shown(content)}",
        )
    return [{"type": "function", "function": without_nulls(call)} for call in calls]


def _joined(parts: list[Any], place: str, column: str) -> str:
    """Content in parts, as multimodal templates take it, where every part is text."""
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise BadRow(f"column {column!r} holds content that is not text", f": {place} has a part {shown(kind)}")
    return "".join(part["text"] for part in parts)
