"""Damage to files, always the same for a seed: bytes that are changed, lost or added, and values of another type."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

_SNIPPETS = (
    b'"',
    b"{",
    b"[",
    b"}",
    b"]",
    b",",
    b"9",
    b"-1",
    b"null",
    b"1e400",
    b"\x00",
    b"\xff",
    b"\\ud800",
    b"[" * 2000,
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 2**40, 10**30, float("nan"), float("inf")),
    *("", "x", "\ud800", [], [[]], [1], ["x"], {}, {"x": 1}),
)


def mutations(content: bytes, count: int, seed: str) -> Iterator[bytes]:
    """`count` damaged copies; half of them of what JSON holds, where it is JSON."""
    source = random.Random(seed)
    try:
        document = json.loads(content)
    except ValueError:
        document = None
    for index in range(count):
        yield _damaged_bytes(content, source) if document is None or index % 2 else _damaged_json(content, source)


def _damaged_bytes(content: bytes, source: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(source.choice((1, 1, 2, 4))):
        place, length = source.randrange(len(data) + 1), source.randrange(1, 24)
        match source.randrange(5):
            case 0:
                data[place : place + 1] = bytes([source.randrange(256)])
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = source.choice(_SNIPPETS)
            case 3:
                data[place:place] = data[source.randrange(len(data) + 1) :][:length]
            case 4 if source.random() < 0.3:
                del data[place:]
    return bytes(data)


def _damaged_json(content: bytes, source: random.Random) -> bytes:
    document = json.loads(content)
    for _ in range(source.choice((1, 1, 2))):
        places = list(_places(document))
        if not places:
            break
        parent, key = source.choice(places)
        if isinstance(parent, dict) and source.random() < 0.25:
            del parent[key]
        else:
            parent[key] = deepcopy(source.choice(_VALUES))  # the next change may be in it
    return json.dumps(document).encode()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Where a value is, in all of a document; of long lists and dictionaries the first ones."""
    items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    for key, value in items[:60]:
        yield node, key
        yield from _places(value)
