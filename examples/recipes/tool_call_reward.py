"""A reward for tool calls: 1 for the calls of the reference and no others, with the same arguments, else 0.

Calls are read as ToolACE and BFCL write them, behind thoughts if there are any:

    <think>Both cities are asked for.</think>[Get Weather(city="Oslo", days=3), Get Weather(city="Bergen", days=3)]

Names may have spaces. The order of calls and of arguments does not matter; types do: 3 is neither "3" nor 3.0. The
paper's authors pay the same way (Trinity-RFT, trinity/common/workflows/customized_toolcall_workflows.py: names and
arguments compared as multisets, all or nothing), of calls written as JSON.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator

_STRING_OR_BRACKET = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[()\[\]{}'"]""", re.DOTALL)
_NAME = re.compile(r"""[^()\[\]{}'"=,]+""")


def same_calls(completions: list[str], references: list[str]) -> list[float | None]:
    """For each completion; None, which ends the run, where the reference itself has no calls."""
    pairs = zip(map(read_calls, completions), map(read_calls, references))
    return [float(made == wanted) if wanted else None for made, wanted in pairs]


def read_calls(text: str) -> list[tuple[str, str]] | None:
    """Name and arguments (as JSON) of each call, sorted; None where the text is anything but a list of calls."""
    answer = text.rpartition("</think>")[2].strip()
    if not (answer.startswith("[") and answer.endswith("]")):
        return None
    try:
        return sorted(_calls(answer[1:-1]))
    # Of Python's parser and of JSON, for what a model may write: deep nesting, null bytes, keys of mixed types.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _calls(text: str) -> Iterator[tuple[str, str]]:
    """Of `name(arguments), name(arguments)`. Raises ValueError, and what Python's parser does."""
    depth, begin, opened = 0, 0, 0
    for part in _STRING_OR_BRACKET.finditer(text):
        if part[0] in "'\"":
            raise ValueError("a string without an end")
        if part[0] in "([{":
            depth += 1
            opened = part.start() if depth == 1 else opened
        elif part[0] in ")]}":
            depth -= 1
            if depth == 0:
                yield _name(text[begin:opened], is_first=begin == 0), _arguments(text[opened : part.end()])
                begin = part.end()
    if depth or text[begin:].strip():
        raise ValueError("a call without an end, or something that is no call")


def _name(text: str, *, is_first: bool) -> str:
    """What stands in front of the arguments, and behind the comma after the call before."""
    comma, name = ("", text.strip()) if is_first else (text.strip()[:1], text.strip()[1:].strip())
    if comma != ("" if is_first else ",") or not _NAME.fullmatch(name):
        raise ValueError("no name")
    return name


def _arguments(text: str) -> str:
    """`(city="Oslo", days=3)` as JSON, its keys sorted."""
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # of "\d", which is what it says
        call = ast.parse(f"f{text}", mode="eval").body
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError("arguments have names here")
    values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    if None in values or len(values) < len(call.keywords):
        raise ValueError("**, or a name twice")
    return json.dumps(values, sort_keys=True)
