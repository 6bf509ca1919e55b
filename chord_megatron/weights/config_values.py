"""Values of a config.json, each of the type that it must have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from chord_megatron.system.sentences import shown

LARGEST = 2**31 - 1
# More than any model has.
MOST_PARTS = 10**4  # layers, experts of a layer: the tables of names grow with them
MOST_POSITIONS = 2**20  # before YaRN: Megatron-Core has a table of them, which no tensor of the model contradicts


class RefusedError(ValueError):
    """What is wrong with a config, without the name of its file."""


def _refused(key: str, kind: str, value: Any) -> RefusedError:
    return RefusedError(f"`{key}` must be {kind}, found {shown(value)}; copy config.json from the model again")


def positive(config: Mapping[str, Any], *names: str) -> Any:
    """The finite number above 0 under the first of these keys that is there."""
    key, value = _find(config, names)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _refused(key, "a positive number", value)
    return value


def count(config: Mapping[str, Any], *names: str, most: int = LARGEST) -> int:
    """The whole number from 1 to `most` under the first of these keys that is there."""
    key, value = _find(config, names)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or value < 1:
        raise _refused(key, "a positive whole number", value)
    if value > most:
        raise _refused(key, f"a positive whole number of up to {most}", value)
    return value


def count_or_none(config: Mapping[str, Any], name: str) -> int:
    """The same of a number that may be 0, as it is where the key is absent."""
    return count(config, name, most=MOST_PARTS) if config.get(name) else 0


def flag(config: Mapping[str, Any], name: str) -> bool:
    """False where it is absent."""
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise _refused(name, "true or false", value)
    return value


def list_of(config: Mapping[str, Any], name: str, kind: type, what: str) -> list[Any]:
    """Empty where it is absent."""
    value = config.get(name, [])
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise _refused(name, f"a list of {what}", value)
    return value


def _find(config: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    key = next((name for name in names if name in config), names[0])
    return key, config.get(key)
