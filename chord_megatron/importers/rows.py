"""The rows of the tables: what becomes of a flag. One constructor for each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from chord_megatron.importers.flags import Flags
from chord_megatron.importers.recipe import Recipe
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import did_you_mean

Reader = Callable[[list[str]], Any]
Condition = Callable[[Flags], bool]
_ABSENT = object()


@dataclass(frozen=True)
class Row:
    """What becomes of one flag."""

    take: Callable[[str, Flags, Recipe], None]
    # What the trainer does where the flag is not given.
    leave: Callable[[str, Flags, Recipe], None] = lambda name, flags, recipe: None
    targets: tuple[str, ...] = ()  # keys here


Table = Mapping[str, Row]


def to(key: str, reader: Reader, default: Any = _ABSENT, *, when: Condition | None = None, otherwise: str = "") -> Row:
    """A flag that is a key here. `default`: the trainer's own; `when`: where the key may be set."""

    def take(name: str, flags: Flags, recipe: Recipe) -> None:
        value = flags.read(name, reader)
        if when is None or when(flags):
            recipe.set(key, value, flags.said(name))
        else:
            recipe.without_effect.append((flags.said(name), otherwise))

    def leave(name: str, flags: Flags, recipe: Recipe) -> None:
        if default is not _ABSENT and (when is None or when(flags)):
            recipe.set_default(key, default, f"{flags.dash}{name}, the default there")

    return Row(take, leave, (key,))


def part_of(*keys: str) -> Row:
    """A flag that a function reads together with others; these keys come of it."""
    return Row(lambda name, flags, recipe: None, targets=keys)


def silent(why: str) -> Row:
    """A flag that changes nothing here, or is as it is here anyway."""
    return Row(lambda name, flags, recipe: recipe.without_effect.append((flags.said(name), why)))


def hardware(why: str, *, unless: tuple[str, ...] = ()) -> Row:
    """A flag that says how a step is computed, which other keys say here."""
    return _remark("hardware", why, unless)


def lacks(why: str, *, unless: tuple[str, ...] = ()) -> Row:
    """A flag that nothing here does; with a value of `unless` it asks for nothing."""
    return _remark("left out", why, unless)


def _remark(kind: Any, why: str, unless: tuple[str, ...]) -> Row:
    def take(name: str, flags: Flags, recipe: Recipe) -> None:
        asks_nothing = flags.text(name, "true").lower() in unless
        if not asks_nothing:
            recipe.remark(kind, flags.said(name), why)
        else:
            recipe.without_effect.append((flags.said(name), "it asks for nothing"))

    return Row(take)


def refuse(why: str, *, unless: tuple[str, ...]) -> Row:
    """A flag that asks for another kind of training, of which nothing would be left."""

    def take(name: str, flags: Flags, recipe: Recipe) -> None:
        if flags.text(name, "true").lower() not in unless:
            raise UserError(f"{flags.said(name)}: {why}")

    return Row(take)


def choice(values: Mapping[str, Any]) -> Reader:
    """One of these words, in any case; what each is here."""

    def read(words: list[str]) -> Any:
        word = " ".join(words).lower()
        if word not in values:
            raise ValueError(f"has no counterpart here; of its values there are {', '.join(values)}")
        return values[word]

    return read


def translate(table: Table, flags: Flags, recipe: Recipe) -> None:
    """Every flag through its row; the rows of flags that were not given have their defaults."""
    for name in [name for name, words in flags.items() if words in (["None"], ["null"])]:
        del flags[name]
    for name in flags:
        if name in table:
            table[name].take(name, flags, recipe)
        else:
            known = did_you_mean(name, [*table])
            recipe.remark("unknown", flags.said(name), f"no flag of {recipe.trainer} that is known here{known}")
    for name, row in table.items():
        if name not in flags:
            row.leave(name, flags, recipe)
