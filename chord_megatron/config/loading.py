"""From YAML and overrides to a configuration, and back."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chord_megatron.config.groups import Config
from chord_megatron.config_names import OTHER_NAMES
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import did_you_mean, shown
from chord_megatron.system.yaml_text import YamlError, read_yaml, read_yaml_value, write_yaml


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read YAML, apply `group.key=value` overrides (values as of `read_yaml_value`), and check every field.

    Relative paths stay relative to the working directory. Raises UserError.
    """
    try:
        raw = read_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        in_run = Path(path) / "config.yaml"
        remedy = f"; name {in_run}" if os.path.isfile(in_run) else ""
        raise UserError(f"cannot read the configuration {path}: {error.strerror}{remedy}") from None
    except ValueError as error:  # of YAML, of UTF-8, or of a path with NUL
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of groups (model, data, train, ...), not {type(raw).__name__}")
    for override in overrides or []:
        _apply_override(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain_mistakes(error)) from None


def explain_mistakes(error: ValidationError) -> str:
    """What is wrong with a configuration, in one sentence."""
    mistakes = [_explain(item) for item in error.errors()]
    more = f"; and {len(mistakes) - _MOST_MISTAKES} more" if len(mistakes) > _MOST_MISTAKES else ""
    return "; ".join(mistakes[:_MOST_MISTAKES]) + more


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    place = f"override {shown(override)}"
    if not equals or not key:
        raise UserError(f"{place} must look like group.key=value")
    if key in Config.model_fields:
        raise UserError(f"{place}: {key!r} is a group; set one of its keys, as in {key}.KEY=value")
    *groups, leaf = key.split(".")
    target = raw
    for group in groups:
        child = target.setdefault(group, {})
        if child is None:
            child = target[group] = {}
        if not isinstance(child, dict):
            raise UserError(f"{place}: {group!r} is a value, not a group")
        target = child
    try:
        target[leaf] = read_yaml_value(value)
    except YamlError:
        raise UserError(f"{place}: the value is not valid YAML; put text in quotes") from None


_MOST_MISTAKES = 5  # in one sentence
_REMEDIES = {
    "bool_type": "must be true or false",
    "dict_type": "must be a group of keys",
    "float_type": "must be a number, without quotes",
    "int_type": "must be an integer, without quotes",
    "list_type": "must be a list, such as [a, b]",
    "model_type": "must be a group of keys",
    "string_too_short": "must not be empty",
    "string_type": "must be text; put it in quotes",
    "too_short": "must not be empty",
}
_BOUNDS = {  # pydantic's name and ours
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def _explain(error: Any) -> str:
    """One pydantic error as a sentence with the dotted key."""
    parts = [part for part in error["loc"] if part not in ("<path>", "<source>", "<list>")]  # the forms of a data set
    location = [shown(part)[1:-1] if isinstance(part, str) else str(part) for part in parts]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        groups = f"; known groups are {', '.join(Config.model_fields)}"
        return f"unknown configuration key {name!r}{nearest_key(name) or groups}"
    if error["type"] == "missing":
        return f"configuration key {name!r} is required"
    remedy = _REMEDIES.get(error["type"])
    if bound := _BOUNDS.get(error["type"]):
        remedy = f"must be {bound[1]} {error['ctx'][bound[0]]:.10g}"
    remedy = remedy or error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if bound and name in ("optimizer.lr", "train.train_iters") and error["input"] == 0:
        remedy += "; `chord-megatron evaluate` draws and scores completions without training"
    return f"{name}={shown(error['input'])}: {remedy}"


def nearest_key(name: str) -> str:
    """The end of a sentence that refuses a key or group: which is meant, with its group; "" where none is near."""
    known, leaf = known_keys(), name.split(".")[-1]
    of_leaf = {key.split(".")[-1]: key for key in reversed(known)}
    wanted = of_leaf.get(leaf) or OTHER_NAMES.get(leaf, name)  # in the wrong group, or in none; of another trainer
    if near := did_you_mean(wanted, known):
        return near
    match = difflib.get_close_matches(leaf, [*of_leaf], n=1)
    return f"; did you mean {of_leaf[match[0]]!r}?" if match else ""


def known_keys() -> list[str]:
    """Every group and dotted leaf of the configuration."""
    keys: list[str] = []
    for group, group_field in Config.model_fields.items():
        keys.append(group)
        group_type: Any = group_field.annotation
        keys.extend(f"{group}.{leaf}" for leaf in group_type.model_fields)
    return keys


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back."""
    return write_yaml(config.model_dump())
