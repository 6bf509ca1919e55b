"""Damage to files, always the same: bytes that are lost, doubled or replaced, and values of another kind in JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# What parsers stumble over: pieces of JSON, YAML, numbers, text that is none.
_SNIPPETS = (
    *(b"", b"\x00", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"\n", b"\r", b"\t", b" ", b"'", b'"', b"\\"),
    *(b"null", b"NaN", b"Infinity", b"-1e999", b"1e400", b"true", b"-1", b"0.5", b"1e-400", b"9"),
    *(b"9" * 30, b"9" * 400, b"7" * 5000, b"[", b"]", b"{", b"}", b",", b":", b"=", b".", b"[]", b"{}", b'"x"'),
    *(b"*r", b"&r", b"<<", b"!!int", b"? ", b"- ", b"#", b"|", b">", b"step_", "é\u2028".encode()),
    *(b"[" * 1200, b"{a: " * 1200, b'{"a":' * 1200, b'{"a": [1]}'),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 2**40, 10**30, float("nan"), float("inf")),
    *("", "x", "\ud800", [], [[]], [1], ["x"], {}, {"x": 1}),
)


def check_damaged(content: bytes, examples: int, check: Callable[[bytes], None]) -> int:
    """Call `check` with damaged copies of `content`; of one that fails hypothesis shows the least damage that does.

    Returns how many there were.
    """
    tried = 0

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(_damaged(content))
    def check_each(damaged: bytes) -> None:
        nonlocal tried
        tried += 1
        check(damaged)

    check_each()
    return tried


@st.composite
def _damaged(draw: st.DrawFn, content: bytes) -> bytes:
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        change = draw(st.sampled_from((_change_slice, _change_slice, _change_word, _change_value, _change_lines)))
        content = change(draw, content)
    return content


def _change_slice(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes are lost, doubled, replaced or put in between; or all that follow are lost."""
    start = draw(st.integers(0, len(content)))
    end = min(len(content), start + draw(st.sampled_from((0, 1, 2, 8, 24, 64))))
    new = draw(st.sampled_from((*_SNIPPETS, content[start:end] * 2, bytes([draw(st.integers(0, 255))]))))
    return content[:start] + new + content[end if draw(st.integers(0, 9)) else len(content) :]


def _change_word(draw: st.DrawFn, content: bytes) -> bytes:
    """A word, a number or a quoted text becomes something else."""
    words = list(re.finditer(rb'"[^"]*"|[-\w.]+', content))
    if not words:
        return content
    start, end = draw(st.sampled_from(words)).span()
    return content[:start] + draw(st.sampled_from(_SNIPPETS)) + content[end:]


def _change_lines(draw: st.DrawFn, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    one, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2)) if lines else (0, 0)
    lines[one : one + 1], lines[other : other + 1] = lines[other : other + 1], lines[one : one + 1]
    return b"".join(lines)


def _change_value(draw: st.DrawFn, content: bytes) -> bytes:
    """A value of a JSON text, or of one of its lines, is of another kind, or is not there."""
    lines = content.splitlines(keepends=True) if _document(content) is None else [content]
    number = draw(st.integers(0, max(0, len(lines) - 1)))
    document = _document(lines[number]) if lines else None
    if document is None:
        return content
    if places := list(_places(document)):
        parent, key = draw(st.sampled_from(places))
        if isinstance(parent, dict) and draw(st.integers(0, 3)) == 0:
            del parent[key]
        else:
            parent[key] = deepcopy(draw(st.sampled_from(_VALUES)))  # the next change may be in it
    lines[number] = json.dumps(document).encode() + b"\n"
    return b"".join(lines)


def _document(text: bytes) -> Any:
    """What JSON says; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Where a value is, in all of a document; of long lists and dictionaries the first ones."""
    items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    for key, value in items[:60]:
        yield node, key
        yield from _places(value)
