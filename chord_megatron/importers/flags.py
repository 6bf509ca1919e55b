"""What was given to another trainer: flags with their words, from a command line or a YAML or JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import shown
from chord_megatron.system.yaml_text import YamlError, read_yaml

_LARGEST_FILE = 2**20  # bytes
_TRUE, _FALSE = ("true", "yes", "1", "t", "y", "on"), ("false", "no", "0", "f", "n", "off")


class Flags(dict[str, list[str]]):
    """Flag -> its words. The readers name the flag and what was given where it is nothing of the kind."""

    def __init__(self, flags: Mapping[str, list[str]], dash: str = "--") -> None:
        super().__init__(flags)
        self.dash = dash

    def text(self, name: str, default: str) -> str:
        """A flag's words as one text."""
        return " ".join(self[name]) if self.get(name) else default

    def integer(self, name: str, default: int) -> int:
        """Raises UserError."""
        return self.read(name, integer) if name in self else default

    def number(self, name: str, default: float) -> float:
        """Raises UserError."""
        return self.read(name, number) if name in self else default

    def boolean(self, name: str, default: bool = False) -> bool:
        """A flag without a word is true. Raises UserError."""
        return self.read(name, boolean) if name in self else default

    def read(self, name: str, reader: Any) -> Any:
        """What `reader` makes of a flag's words. Raises UserError with the flag and its words."""
        try:
            return reader(self[name])
        except ValueError as error:
            said, sign = self.said(name), " " if self.dash else "="
            hint = f", and the script does not say which; add {self.dash}{name}{sign}VALUE behind the script's name"
            raise UserError(f"{said}: {error}{hint if '$' in said else ''}") from None

    def said(self, name: str) -> str:
        """A flag as it was given, without the middle of what is long."""
        words = " ".join(self[name])
        if self.dash:
            return f"{self.dash}{name} {_short(words)}".rstrip()
        return f"{name}={_short(words)}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:40]}..."


def text(words: list[str]) -> str:
    """Words as one text."""
    if not words:
        raise ValueError("needs a value")
    return " ".join(words)


def texts(words: list[str]) -> list[str]:
    """Words as they are."""
    return words


def integer(words: list[str]) -> int:
    """One integer; `1e3` is one, too."""
    value = number(words)
    if not value.is_integer():
        raise ValueError("must be an integer")
    return int(value)


def number(words: list[str]) -> float:
    """One number."""
    try:
        (word,) = words
        value = float(word.replace("_", "") if re.fullmatch(r"[0-9_.eE+-]+", word) else word)
    except ValueError:
        raise ValueError("must be one number") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be a finite number")
    return value


def numbers(words: list[str]) -> list[float]:
    """Numbers."""
    return [number([word]) for word in words]


def boolean(words: list[str]) -> bool:
    """true or false, in any of the spellings of argparse; nothing is true."""
    word = words[0].lower() if len(words) == 1 else "true" if not words else "?"
    if word not in _TRUE + _FALSE:
        raise ValueError("must be true or false")
    return word in _TRUE


def read_arguments(words: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Flags of argparse (`--name word word`, `--name=word`), and the words before the first; the last wins."""
    flags: dict[str, list[str]] = {}
    before: list[str] = []
    current = before
    for word in words:
        if match := re.match(r"--([A-Za-z_][A-Za-z0-9_-]*)(=|$)", word):
            current = flags[match[1].replace("-", "_")] = []
            if match[2]:
                current.append(word[match.end() :])
        else:
            current.append(word)
    return flags, before


def read_keys(words: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Keys of hydra (`group.key=value`, also after + or ++), and what is none; the last of equals wins."""
    keys: dict[str, list[str]] = {}
    others: list[str] = []
    for word in words:
        match = re.match(r"\+{0,2}([A-Za-z_][\w@/-]*(?:\.[\w-]+)*)=", word)
        if match:
            keys[match[1]] = value_words(_value(word[match.end() :]))
        elif not word.startswith("~"):
            others.append(word)
    return keys, others


def _value(word: str) -> Any:
    word = word.strip()
    if not word.startswith(("[", "{", "'", '"')):
        return None if word in ("null", "None", "~", "") else word
    try:
        return read_yaml(word)
    except YamlError:
        return word


def value_words(value: Any) -> list[str]:
    """The words of a value of a YAML or JSON file."""
    if value is None:
        return ["null"]
    if isinstance(value, list):
        return [word for item in value for word in value_words(item)]
    if isinstance(value, bool):
        return ["true" if value else "false"]
    if isinstance(value, dict):
        return [json.dumps(value, ensure_ascii=False)]
    return [str(value)]


def read_mapping(path: Path) -> dict[str, list[str]]:
    """Flags of a YAML or JSON file; keys without a value have the trainer's default. Raises UserError."""
    content = read_file(path)
    try:
        found = read_yaml(content)
    except YamlError as error:
        raise UserError(f"{path} is not valid YAML or JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a mapping of flags to values, not {shown(found)}")
    return {str(key): value_words(value) for key, value in found.items() if value is not None}


def read_file(path: Path) -> str:
    """The text of a file of the user's. Raises UserError."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise UserError(
                f"{path} is larger than {_LARGEST_FILE // 2**20} MiB, which no script is; name another file"
            )
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:  # UTF-8, or a path with NUL
        raise UserError(f"{path} is not text in UTF-8; name a script, a YAML or a JSON file") from None
