"""The child process of `PluginReward`: `python -P worker.py FILE FUNCTION`, standard library only.

One JSON line in, the arguments by name; one out, `{"result": ...}` or `{"error": "..."}`. The first line out says
whether the function was loaded and what parameters it has. The end of standard input (the parent is gone) ends the
process, even in the middle of a call.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, BinaryIO


def main(file: str, function_name: str) -> None:
    requests, answers = _take_over_pipes()
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read_lines, args=(requests, lines), daemon=True).start()
    try:
        function = _Function(_load(file, function_name))
    except BaseException as error:
        return _send(answers, {"error": _explain(error, file)})
    _send(answers, {"result": function.parameters})
    while True:
        arguments = json.loads(lines.get())
        try:
            answer = {"result": _plain(function(arguments))}
        except BaseException as error:  # sys.exit in a reward function is a mistake like any other
            answer = {"error": _explain(error, file) + function.hint(error)}
        _send(answers, answer)


class _Function:
    """A user's function, called with arguments by name; `parameters` says which it takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._loop = asyncio.Runner()  # one for all calls: what an asynchronous function keeps belongs to its loop
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._positional = [p.name for p in named if p.kind == p.POSITIONAL_ONLY]
        if not named and any(p.kind == p.VAR_POSITIONAL for p in parameters):  # f(*args): in the documented order
            self._positional = ["prompts", "completions", "references"]
        # As TRL annotates functions for conversations: completions: list[list[dict[str, str]]].
        self._takes_messages = any(p.name == "completions" and "dict" in str(p.annotation).lower() for p in named)
        self.parameters = {
            "required": [p.name for p in named if p.default is p.empty],
            "optional": [*self._positional, *(p.name for p in named)],
            "takes_all": any(p.kind == p.VAR_KEYWORD for p in parameters),
        }

    def __call__(self, arguments: dict[str, Any]) -> Any:
        if self._takes_messages:
            texts = arguments["completions"]
            arguments["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
        positional = [arguments.pop(name) for name in self._positional if name in arguments]
        result = self._function(*positional, **arguments)
        return self._loop.run(_wait_for(result)) if inspect.isawaitable(result) else result

    def hint(self, error: BaseException) -> str:
        """What a function that was written for conversations should be told."""
        if not (isinstance(error, TypeError) and "string indices must be integers" in str(error)):
            return ""
        return "; completions are texts; annotate them as in TRL, completions: list[list[dict]], to get messages"


async def _wait_for(result: Awaitable[Any]) -> Any:
    return await result


def _take_over_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The protocol's pipes; the user's own input becomes empty and their prints go to standard error."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    return requests, answers


def _read_lines(requests: BinaryIO, lines: queue.Queue[bytes]) -> None:
    for line in requests:
        lines.put(line)
    os._exit(0)


def _load(file: str, function_name: str) -> Callable[..., Any]:
    sys.path.insert(0, str(Path(file).parent))  # the file's neighbours, as for a script
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look the module up
    spec.loader.exec_module(module)
    function = getattr(module, function_name, None)
    if not callable(function):
        found = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise AttributeError(f"no function {function_name!r}; the file has {', '.join(found) or 'none'}")
    return _callable(function)


def _callable(function: Any) -> Callable[..., Any]:
    """The function, or an object of the class. Raises TypeError."""
    if inspect.isclass(function):
        parameters = inspect.signature(function).parameters.values()
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [repr(p.name) for p in parameters if p.default is p.empty and p.kind not in kinds]
        if needed:
            raise TypeError(f"a class that needs {', '.join(needed)}; name an object of it")
        function = function()
        if not callable(function):
            raise TypeError("its objects cannot be called; they need __call__")
    for called in (function, type(function).__call__):
        if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
            raise TypeError("a generator; return a list of numbers")
    return function


def _plain(value: Any) -> Any:
    """NumPy and torch values as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _explain(error: BaseException, file: str) -> str:
    """Type, message and the deepest line of the user's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    return f"{type(error).__name__}: {error}" + (f" ({file}:{lines[-1]})" if lines else "")


def _send(answers: BinaryIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer, default=repr).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
