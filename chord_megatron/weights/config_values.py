"""Values of a config.json, each of the type that it must have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_LARGEST = 2**31 - 1
MOST_PARTS = 10**4  # layers, experts of a layer: more than any model has; the tables of names grow with them


class RefusedError(ValueError):
    """What is wrong with a config, without the name of its file."""


def positive(config: Mapping[str, Any], *names: str, inside: str = "") -> Any:
    """The finite number above 0 under the first of these keys that is there; `inside` names the object they are in."""
    key, value = _find(config, names)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise RefusedError(f"`{inside}{key}` must be a positive number, found {_shown(value)}")
    return value


def count(config: Mapping[str, Any], *names: str, parts: bool = False) -> int:
    """The whole number above 0 under the first of these keys that is there; parts: it counts layers or experts."""
    key, value = _find(config, names)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or value < 1:
        raise RefusedError(f"`{key}` must be a positive whole number, found {_shown(value)}")
    if value > (largest := MOST_PARTS if parts else _LARGEST):
        raise RefusedError(f"`{key}` must be a positive whole number of up to {largest}, found {_shown(value)}")
    return value


def count_or_none(config: Mapping[str, Any], name: str) -> int:
    """The same of a number that may be 0, as it is where the key is absent."""
    return count(config, name, parts=True) if config.get(name) else 0


def flag(config: Mapping[str, Any], name: str) -> bool:
    """False where it is absent."""
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise RefusedError(f"`{name}` must be true or false, found {_shown(value)}")
    return value


def list_of(config: Mapping[str, Any], name: str, kind: type, what: str) -> list[Any]:
    """Empty where it is absent."""
    value = config.get(name, [])
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise RefusedError(f"`{name}` must be a list of {what}, found {_shown(value)}")
    return value


def _find(config: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    key = next((name for name in names if name in config), names[0])
    return key, config.get(key)


def _shown(value: Any) -> str:
    """A value that may be as long as a damaged file."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
