"""The arguments of tool calls: an object as transformers documents it, or the JSON text of one as OpenAI's API has it.

Templates take one or the other, and which is not written down. One that takes objects writes a text as JSON once more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from chord_megatron.data.messages import Message


def forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The forms in which a template may take them, the given one first."""
    yield messages
    if any("tool_calls" in message for message in messages):
        yield (other := with_other_arguments(messages))
        yield from map(with_empty_content, (messages, other))


def with_empty_content(messages: list[Message]) -> list[Message]:
    """The same messages with "" for content that is null, which some templates want beside a call of a tool."""
    return [{**message, "content": ""} if message.get("content", "") is None else message for message in messages]


def with_other_arguments(messages: list[Message]) -> list[Message]:
    """The same messages with objects as texts, and texts as objects."""
    return [_with_other_arguments(message) for message in messages]


def is_written_twice(messages: list[Message], rendered: str) -> bool:
    """Whether a text of arguments stands in `rendered` as JSON of JSON."""
    return any(json.dumps(text, ensure_ascii=False) in rendered for text in _texts(messages))


def _with_other_arguments(message: Message) -> Message:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_other(call) for call in calls]} if isinstance(calls, list) else message


def _other(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _other(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, dict):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {**call, "arguments": _object(arguments)} if _object(arguments) is not None else call


def _texts(messages: list[Message]) -> Iterator[str]:
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str) and _object(arguments) is not None:
                yield arguments


def _object(text: Any) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
