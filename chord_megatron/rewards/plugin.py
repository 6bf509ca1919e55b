"""A user's reward function in a child process, which can be killed when it hangs."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from chord_megatron.rewards.arguments import FIXED, Offer, Parameters
from chord_megatron.system.errors import UserError

_WORKER = Path(__file__).with_name("worker.py")


def is_plugin(name: str) -> bool:
    """Whether it is `path.py:function`. Raises UserError where the file is not there."""
    path, _, function_name = name.rpartition(":")
    if not path.endswith(".py") or not function_name.isidentifier():
        return False
    if not Path(path).expanduser().is_file():
        raise UserError(f"reward function {name}: {Path(path).absolute()} does not exist; mend rewards.reward_funcs")
    return True


class PluginReward:
    """`path.py:function` in one persistent child (worker.py), with one JSON line per call and per answer.

    A plain child rather than multiprocessing: spawn would run the training script again under torchrun, and
    fork is unsafe once CUDA or gloo threads exist. After a failure the child is gone and is not restarted.
    """

    def __init__(self, name: str, timeout_seconds: float, offer: Offer):
        """Start the child and load the function.

        Raises UserError where that fails or takes too long, or where the function needs what is not offered.
        """
        self._name, self._timeout_seconds, self._offer = name, timeout_seconds, offer
        path, _, function_name = name.rpartition(":")
        file = Path(path).expanduser().resolve()
        # -P keeps this folder off the child's path; a new session keeps Ctrl-C for the parent.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(file), function_name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._parameters = Parameters(**self._receive())
        if refusal := offer.refusal(self._parameters):
            self.close()
            raise UserError(f"reward function {self._name} {refusal}")

    def __call__(self, prompts: list[str], completions: list[str], references: list[str], /, **columns: Any) -> Any:
        """What the function returns, unchecked. Raises UserError where it raises, hangs or exits."""
        fixed = dict(zip(FIXED, (prompts, completions, references)))
        request = json.dumps(self._offer.choose(self._parameters, fixed, columns), default=str)
        assert self._process.stdin is not None
        try:
            unsent = memoryview(request.encode() + b"\n")
            while unsent:  # an unbuffered pipe may take less than it is given
                unsent = unsent[self._process.stdin.write(unsent) :]
        except (BrokenPipeError, ValueError):  # it ended, or `close` was called
            raise self._failure("its process has ended") from None
        return self._receive()

    def close(self) -> None:
        """End the child, by its pid; safe to call twice."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _receive(self) -> Any:
        answer = json.loads(self._read_line())
        if "error" in answer:
            raise self._failure(answer["error"])
        return answer["result"]

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        poll = select.poll()  # select.select fails on descriptors above 1023
        poll.register(pipe, select.POLLIN)
        deadline = time.monotonic() + self._timeout_seconds
        line = b""
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise self._failure(f"no answer within rewards.timeout_seconds={self._timeout_seconds:g}")
            chunk = os.read(pipe, 1 << 20)
            if not chunk:
                raise self._failure(f"its process ended with exit code {self._process.wait()}")
            line += chunk
        return line

    def _failure(self, reason: str) -> UserError:
        self.close()
        return UserError(f"reward function {self._name}: {reason}")
