"""YAML as people mean it: version 1.2's words and numbers, each key once, and nothing that runs away."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from chord_megatron.system.yaml_text import YamlError, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),  # text in YAML 1.1
        ("1E+3", 1000.0),
        ("5e-7", 5e-7),
        (".5", 0.5),
        ("-3.", -3.0),
        ("+.inf", math.inf),
        ("0x1F", 31),
        ("0o17", 15),
        ("010", 10),  # 8 in YAML 1.1
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        # Words and dates in YAML 1.1 are something else.
        *((word, word) for word in ("yes", "no", "on", "off", "y", "2024-01-01", "1:30", "1_000", "1e", "e5", "=")),
        ("'1e-6'", "1e-6"),
        ("[a, 1, &x b, *x]", ["a", 1, "b", "b"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_a_value_is_what_it_looks_like(text: str, value: Any):
    read = read_yaml(text)
    assert read == value and type(read) is type(value)


def test_nan_is_nan():
    assert math.isnan(read_yaml(".nan"))


BOMB = "a: &a [1, 1]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)
)
MERGE_BOMB = "a: &a {k: 1}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{', '.join(['*' + chr(97 + n)] * 9)}]}}\n" for n in range(12)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train: {a: 1}\nmodel: {}\ntrain: {b: 2}\n", "line 3: the key 'train' is written twice; keep one of them"),
        ("train:\n  seed: 1\n  lr: 2\n  seed: 1\n", "line 4: the key 'seed' is written twice; keep one of them"),
        ("{a: 1, 'a': 2}", "line 1: the key 'a' is written twice; keep one of them"),
        ("1: a", "line 1: '1' is no name of a key; put it in quotes"),
        ("null: a", "line 1: 'null' is no name of a key; put it in quotes"),
        ("true: a", "line 1: 'true' is no name of a key; put it in quotes"),
        ("? [a]\n: b", "line 1: a list or a group is no name of a key"),
        (
            "a: !!python/name:os.system x",
            "line 1: the tag '!!python/name:os.system' is not for configurations; remove it",
        ),
        ("a: !!timestamp 2024-01-01", "line 1: the tag '!!timestamp' is not for configurations; remove it"),
        ("a: !!binary aGk=", "line 1: the tag '!!binary' is not for configurations; remove it"),
        ("a: !own x", "line 1: the tag '!own' is not for configurations; remove it"),
        ("a: !!int x", "invalid literal for int() with base 10: 'x'"),
        ("a: " + "1" * 5000, "Exceeds the limit (4300 digits) for integer string conversion"),
        ("[" * 50_000, "nested too deeply"),
        ("a: " + "{b: " * 50_000, "nested too deeply"),
        ("---\na: 1\n---\nb: 2\n", "expected a single document in the stream"),
        ("a: *b", "found undefined alias 'b'"),
        ("\x00", "unacceptable character #x0000: special characters are not allowed"),
        ("a: [1", "while parsing a flow sequence"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, problem: str):
    with pytest.raises(YamlError) as error:
        read_yaml(text)
    assert problem in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_aliases_are_shared_and_not_copied():
    read = read_yaml(BOMB)
    assert read["b"][0] is read["a"] and read["m"][0] is read["l"]


def test_a_merge_key_is_a_key_like_others():
    """YAML 1.2 has none; of nested ones each level would copy the one below nine times."""
    assert read_yaml(MERGE_BOMB)["m"].keys() == {"<<"}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@given(VALUES)
@settings(derandomize=True, max_examples=300, deadline=None)
def test_what_is_written_reads_back(value: Any):
    text = write_yaml(value)
    text.encode()
    assert read_yaml(text) == value


@given(
    st.sampled_from(["yes", "No", "on", "1e-6", "010", "0o7", "1:30", "2024-01-01", "1_000", "~", "", "=", "<<", "1."])
)
@settings(derandomize=True, max_examples=50, deadline=None)
def test_text_that_others_read_differently_is_quoted(text: str):
    """The file of a run is read by people's own scripts, too, most of them with YAML 1.1."""
    written = write_yaml({"key": text})
    assert read_yaml(written) == yaml.safe_load(written) == {"key": text}
