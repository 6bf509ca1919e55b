"""What a column holds: text or a finite number, and nothing else by `str()`."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from chord_megatron.data.bad_rows import BadRow
from chord_megatron.data.sources import Row
from chord_megatron.system.sentences import shown

_LARGEST_WEIGHT = 1e30  # as of the numbers of a configuration


def read_text(row: Row, column: str) -> str:
    """A column, or a dotted path into its objects, as text. Raises BadRow."""
    return as_text(read_column(row, column), column)


def read_column(row: Row, column: str, key: str = "the configuration") -> Any:
    """`row[column]`; "a.b" leads into the object of column "a" where no column has that very name.

    Raises BadRow, which names the configuration's key that says which column it is.
    """
    if column in row:
        return row[column]
    value: Any = row
    place = "it"
    for part in column.split("."):
        if not isinstance(value, Mapping):
            raise BadRow(f"no column {column!r}", f"; {place} is no object; {key} names it")
        if part not in value:
            there = ", ".join(map(repr, value))
            raise BadRow(f"no column {column!r}", f"; {place} has {there}, of which {key} may name one")
        value, place = value[part], repr(part)
    return value


def as_text(value: Any, column: str) -> str:
    """Text as it is; a number exactly and without an exponent, which would be read as a formula. Raises BadRow."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"column {column!r} is empty")
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        raise BadRow(f"column {column!r} holds true or false, not text or a number", f": {value}")
    if isinstance(value, (int, float, Decimal)):
        number = Decimal(repr(value) if isinstance(value, float) else value)
        if not number.is_finite():
            raise BadRow(f"column {column!r} is not a finite number", f": {value}")
        return format(number, "f")
    if isinstance(value, Mapping):
        if not value:
            raise BadRow(f"column {column!r} holds an empty object")
        keys = " or ".join(repr(f"{column}.{key}") for key in value)
        raise BadRow(f"column {column!r} holds an object", f", not text or a number; name {keys} instead")
    kind = "a list" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
    raise BadRow(f"column {column!r} holds {kind}", f", not text or a number: {shown(value)}")


def read_weight(value: Any, what: str) -> float:
    """A finite number that is not negative. Raises BadRow."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= _LARGEST_WEIGHT:
        raise BadRow(f"{what} is not a number from 0 to {_LARGEST_WEIGHT:g}", f": {shown(value)}")
    return float(value)
