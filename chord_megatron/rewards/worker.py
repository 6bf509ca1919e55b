"""The processes of `PluginReward`: `python -P worker.py OPTIONS`, JSON of `Options`; standard library only.

The first forks the one that calls the user's function, and is there to end all others of its process group when the
trainer is gone. The second reads a JSON line for each call, its number and the arguments by name, and writes one,
`{"number": ..., "result": ...}` or `{"number": ..., "error": "..."}`. Line 0 says whether the function was loaded and
what parameters it has. The end of standard input ends it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import os
import resource
import runpy
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_LONGEST_REASON = 2000
# By its file: the package is not on this process's path, and it need not import all of it.
_processes = runpy.run_path(str(Path(__file__).parents[1] / "system" / "processes.py"))


@dataclass(frozen=True)
class Options:
    """What the trainer tells its worker."""

    trainer: int  # its process
    file: str
    function_name: str
    memory_limit_gb: float | None


def main(options: Options) -> None:
    """Run both processes."""
    worker = os.fork()
    if worker:
        # A function may hold the interpreter's lock, and a pipe of the trainer's stays open as long as any fork of the
        # trainer has it: the end of neither says in time that the trainer has ended.
        _processes["guard"](worker, parent=options.trainer)
    _processes["end_with_parent"]()
    _outlive_sigterm()
    if options.memory_limit_gb is not None:
        _limit_memory(options.memory_limit_gb)
    _serve(options)


def _outlive_sigterm() -> None:
    """A scheduler sends it to all processes of a job, and the trainer wants the rewards of a last step.

    What functions fork is ended by it, as ever: also when it comes while they fork.
    """

    def as_ever() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

    signal.signal(signal.SIGTERM, lambda *_: None)
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]),
        after_in_child=as_ever,
    )


def _limit_memory(gigabytes: float) -> None:
    """Of each process: its address space."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(gigabytes * 10**9)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _serve(options: Options) -> None:
    requests, answers = _take_over_pipes()
    try:
        function = _Function(_load(options.file, options.function_name))
    except BaseException as error:
        return _send(answers, _encode({"number": 0, "error": _explain(error, options)}))
    _send(answers, _encode({"number": 0, "result": function.parameters}))
    process = os.getpid()
    for line in requests:
        request = json.loads(line)
        number = request["number"]
        try:
            answer = _encode({"number": number, "result": _plain(function(request["arguments"]))})
        except BaseException as error:  # sys.exit in a reward function is a mistake like any other
            answer = _encode({"number": number, "error": _explain(error, options) + function.hint(error)})
        if os.getpid() != process:  # a fork that returned from the function, or raised
            os._exit(0)
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


def _explain(error: BaseException, options: Options) -> str:
    """Type, message and the deepest line of the user's file."""
    file, limit = options.file, options.memory_limit_gb
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    memory = f"; rewards.memory_limit_gb is {limit:g}" if limit and isinstance(error, MemoryError) else ""
    reason = f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
    return reason + (f" ({file}:{lines[-1]})" if lines else "") + memory


def _encode(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, default=repr).encode() + b"\n"


def _send(answers: BinaryIO, line: bytes) -> None:
    answers.write(line)
    answers.flush()


if __name__ == "__main__":
    main(Options(**json.loads(sys.argv[1])))
