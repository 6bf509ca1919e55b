"""The child process of `PluginReward`: `python -P worker.py FILE FUNCTION`, standard library only.

One JSON line in, `[positional, columns]`; one out, `{"result": ...}` or `{"error": "..."}`. The first line
out says whether the function was loaded. The end of standard input (the parent is gone) ends the process,
even in the middle of a call.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def main(file: str, function_name: str) -> None:
    requests, answers = _take_over_pipes()
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read_lines, args=(requests, lines), daemon=True).start()
    try:
        function = _load(file, function_name)
    except BaseException as error:
        return _send(answers, {"error": _explain(error, file)})
    _send(answers, {"result": None})
    while True:
        positional, columns = json.loads(lines.get())
        try:
            answer = {"result": _plain(function(*positional, **columns))}
        except BaseException as error:  # sys.exit in a reward function is a mistake like any other
            answer = {"error": _explain(error, file)}
        _send(answers, answer)


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
