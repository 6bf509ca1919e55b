"""Functions of the user's own in this process, named as `path.py:function`: what must take part in the gradient.

Reward functions are not loaded here: they run in processes of their own (rewards/plugin.py).
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import counted, one_line


def is_user_function(name: str) -> bool:
    """Whether it looks like `path.py:function`."""
    path, _, function = name.rpartition(":")
    return path.endswith(".py") and function.isidentifier()


def load_user_function(key: str, name: str, *, arguments: int) -> Callable[..., Any]:
    """The function that the configuration's `key` names, which takes that many arguments by place.

    The file is run, as `python FILE` would. Raises UserError where it is missing, fails, or has no such function.
    """
    path, _, function_name = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}={name}: {file.absolute()} does not exist; mend {key}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # dataclasses look the module up
    with failures_named(key, name, "cannot be loaded"):
        spec.loader.exec_module(module)
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        found = ", ".join(name for name, value in vars(module).items() if inspect.isfunction(value)) or "none"
        raise UserError(f"{key}={name}: the file has no function {function_name!r}, but {found}; mend {key}")
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        raise UserError(f"{key}={name} must take {counted(arguments, 'argument')} by place") from None
    return function


@contextmanager
def failures_named(key: str, name: str, what: str = "fails") -> Iterator[None]:
    """Raise UserError for what a function of the user's raises, with the deepest line of its file.

    `sys.exit` in it, too: the run would end as if it were done.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        file = str(Path(name.rpartition(":")[0]).expanduser())
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f" ({file}:{lines[-1]})" if lines else ""
        raise UserError(f"{key}={name} {what}: {type(error).__name__}: {one_line(error)}{place}") from error
