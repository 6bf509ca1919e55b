"""YAML with the words and numbers of version 1.2, in which `1e-6` is a number, `no` is text, and `010` is ten.

PyYAML reads version 1.1. Beyond that a key is text and comes once, tags are refused, and merge keys (`<<`), which
version 1.2 does not have, are keys like others.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from chord_megatron.system.sentences import one_line

_STANDARD = "tag:yaml.org,2002:"
# Tag, what it looks like (YAML 1.2.2, 10.3.2), and what it can begin with.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class YamlError(ValueError):
    """One sentence that says what is wrong with a text, with the line where there is one."""


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises YamlError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except YamlError:
        raise
    except RecursionError:
        raise YamlError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(one_line(error)) from None


def read_yaml_value(text: str) -> Any:
    """The value of a command line's argument. Raises YamlError.

    YAML where it begins as a list, a group or quoted text; else a number, a word of YAML, or text as it stands: an
    argument has no comments, and `*(.+)` is not an alias.
    """
    text = text.strip()
    if text.startswith(("[", "{", "'", '"')):
        value = read_yaml(text)
        node = yaml.compose(text, Loader=_Loader)
        assert node is not None
        if behind := text[node.end_mark.index :].strip():
            raise YamlError(f"{behind!r} follows the value")
        return value
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except ValueError as error:  # an integer of thousands of digits
        raise YamlError(str(error)) from None


def write_yaml(value: Any) -> str:
    """The text of a value, which readers of version 1.1 and 1.2 understand alike."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def write_yaml_line(value: Any) -> str:
    """The same, on one line."""
    style = '"' if isinstance(value, str) and "\n" in value else None
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, default_style=style, width=float("inf")
    )
    return text.removesuffix("...\n").strip()


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the scalars of version 1.2 alone."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called for each mapping, in PyYAML to merge others into it: checks its keys."""
        seen = set()
        for key, _ in node.value:
            line = f"line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise YamlError(f"{line}: a list or a group is no name of a key")
            if key.tag != f"{_STANDARD}str":
                raise YamlError(f"{line}: {key.value!r} is no name of a key; put it in quotes")
            if key.value in seen:
                raise YamlError(f"{line}: the key {key.value!r} is written twice; keep one of them")
            seen.add(key.value)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        value = self.construct_scalar(node)
        if node.tag.endswith("float"):
            return float(value.replace(".", "") if value[-1:].isalpha() else value)
        return int(value, 0) if value[:2] in ("0o", "0x") else int(value)

    def construct_bool(self, node: yaml.ScalarNode) -> bool:
        return self.construct_scalar(node).lower() == "true"

    def refuse(self, node: yaml.Node) -> None:
        tag = node.tag.replace(_STANDARD, "!!")
        raise YamlError(f"line {node.start_mark.line + 1}: the tag {tag!r} is not for configurations; remove it")


class _Dumper(yaml.SafeDumper):
    """Also quotes what is text in version 1.1 alone, beside what PyYAML quotes anyway."""


_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {
    f"{_STANDARD}{kind}": yaml.SafeLoader.yaml_constructors[f"{_STANDARD}{kind}"]
    for kind in ("null", "str", "seq", "map")
}
_Loader.add_constructor(f"{_STANDARD}int", _Loader.construct_number)
_Loader.add_constructor(f"{_STANDARD}float", _Loader.construct_number)
_Loader.add_constructor(f"{_STANDARD}bool", _Loader.construct_bool)
_Loader.add_constructor(None, _Loader.refuse)
for _kind, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"{_STANDARD}{_kind}", re.compile(f"(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
        )
