"""A user's reward function in a child process, which can be killed when it hangs."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from chord_megatron.rewards.arguments import FIXED, Offer, Parameters
from chord_megatron.system.errors import UserError
from chord_megatron.system.user_functions import is_user_function

_WORKER = Path(__file__).with_name("worker.py")
_LONGEST_ANSWER_MB = 64
_SECONDS_BETWEEN_LOOKS = 0.5  # whether the process is there, while something that it started holds its pipe

# What programs need of the environment. Not the trainer's tokens, keys and proxies, nor its place in the job.
_VARIABLES = {
    *("HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "SHELL", "TMPDIR", "TZ", "USER"),
    *("HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT"),
    *("NLTK_DATA", "TOKENIZERS_PARALLELISM", "TORCH_HOME", "TRANSFORMERS_OFFLINE", "VIRTUAL_ENV"),
}
_PREFIXES = ("CONDA_", "CUDA_", "LC_", "MKL_", "NVIDIA_", "OMP_", "OPENBLAS_", "PYTHON", "SSL_CERT_", "XDG_")


@dataclass(frozen=True)
class Limits:
    """Of the process of a user's function: isolation from mistakes, not from malice."""

    timeout_seconds: float  # of a call
    memory_limit_gb: float | None = None  # address space of each of its processes
    environment: tuple[str, ...] = ()  # variables that it sees beside those that programs need


def is_plugin(name: str) -> bool:
    """Whether it is `path.py:function`. Raises UserError where the file is not there."""
    if not is_user_function(name):
        return False
    path = Path(name.rpartition(":")[0])
    if not path.expanduser().is_file():
        raise UserError(f"reward function {name}: {path.absolute()} does not exist; mend rewards.reward_funcs")
    return True


class PluginReward:
    """`path.py:function` in one persistent child (worker.py), with one JSON line per call and per answer.

    A plain child rather than multiprocessing: spawn would run the training script again under torchrun, and
    fork is unsafe once CUDA or gloo threads exist. After a failure the child is gone and is not restarted.
    """

    def __init__(self, name: str, limits: Limits, offer: Offer):
        """Start the child and load the function.

        Raises UserError where that fails or takes too long, or where the function needs what is not offered.
        """
        self._name, self._limits, self._offer = name, limits, offer
        path, _, function_name = name.rpartition(":")
        options = {
            "trainer": os.getpid(),
            "file": str(Path(path).expanduser().resolve()),
            "function_name": function_name,
            "memory_limit_gb": limits.memory_limit_gb,
        }
        # -P keeps this folder off the child's path; a new session keeps Ctrl-C for the parent, and is a process group.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env=dict(_visible(limits.environment)),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        os.set_blocking(self._requests.fileno(), False)
        self._numbers = count()
        self._parameters = Parameters(**self._receive(next(self._numbers), self._deadline()))
        if refusal := offer.refusal(self._parameters):
            self.close()
            raise UserError(f"reward function {self._name} {refusal}")

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        references: list[str],
        completion_ids: list[list[int]],
        /,
        **columns: Any,
    ) -> Any:
        """What the function returns, unchecked. Raises UserError where it raises, hangs or exits."""
        fixed = dict(zip(FIXED, (prompts, completions, references)))
        number, deadline = next(self._numbers), self._deadline()
        arguments = self._offer.choose(self._parameters, fixed, completion_ids, columns)
        self._send(json.dumps({"number": number, "arguments": arguments}, default=str), deadline)
        return self._receive(number, deadline)

    def close(self) -> None:
        """End the child and whatever it started, as far as that stayed in its process group; safe to call twice."""
        if self._process.returncode is None:  # until it is waited for, its number is nobody else's
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._requests.close()
        self._answers.close()

    def _deadline(self) -> float:
        return time.monotonic() + self._limits.timeout_seconds

    def _send(self, request: str, deadline: float) -> None:
        if self._requests.closed:
            raise self._failure("its process has ended")
        unsent = memoryview(request.encode() + b"\n")
        try:
            while unsent:  # a pipe may take less than it is given
                self._wait_for(self._requests.fileno(), select.POLLOUT, deadline)
                unsent = unsent[os.write(self._requests.fileno(), unsent) :]
        except BrokenPipeError:
            raise self._failure(self._how_it_ended()) from None

    def _receive(self, number: int, deadline: float) -> Any:
        line = self._read_line(deadline)
        try:
            answer = json.loads(line)
            result = answer.get("result")
            is_ours = answer["number"] == number and ("result" in answer or isinstance(answer["error"], str))
        except (ValueError, RecursionError, LookupError, AttributeError, TypeError):
            is_ours = False
        if not is_ours:
            raise self._failure(
                f"something else than its answer to call {number} was written, {line[:80]!r}: a function wrote into "
                "the pipe of its answers; leave file descriptors that it did not open alone"
            )
        if "error" in answer:
            raise self._failure(answer["error"])
        return result

    def _read_line(self, deadline: float) -> bytes:
        line = bytearray()
        while not line.endswith(b"\n"):
            self._wait_for(self._answers.fileno(), select.POLLIN, deadline)
            chunk = os.read(self._answers.fileno(), 1 << 20)
            if not chunk:
                raise self._failure(self._how_it_ended())
            line += chunk
            if len(line) > _LONGEST_ANSWER_MB * 10**6:
                raise self._failure(f"its answer is longer than {_LONGEST_ANSWER_MB} MB; return a list of numbers")
        return bytes(line)

    def _wait_for(self, pipe: int, event: int, deadline: float) -> None:
        poll = select.poll()  # select.select fails on descriptors above 1023
        poll.register(pipe, event)
        while True:
            has_ended = self._has_ended()  # asked first: what it wrote before its end is there then
            seconds_left = max(0.0, deadline - time.monotonic())
            if poll.poll(1000 * (0.0 if has_ended else min(seconds_left, _SECONDS_BETWEEN_LOOKS))):
                return
            if has_ended:
                raise self._failure(self._how_it_ended())
            if not seconds_left:
                raise self._failure(f"no answer within rewards.timeout_seconds={self._limits.timeout_seconds:g}")

    def _has_ended(self) -> bool:
        """Without waiting for it, which would give its number away."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _how_it_ended(self) -> str:
        """Of a child whose pipes are closed, or that is no more."""
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self.close()
        code = self._process.returncode
        number = -code if code < 0 else code - 128  # its own end, or that of the process which it forked
        if number not in {*signal.Signals}:
            return f"its process ended with exit code {code}"
        name = signal.Signals(number).name
        return f"its process was ended by {name}" + ": out of memory?" * (name == "SIGKILL")

    def _failure(self, reason: str) -> UserError:
        self.close()
        return UserError(f"reward function {self._name}: {reason}")


def _visible(further: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The environment of the child."""
    for name, value in os.environ.items():
        if name in _VARIABLES or name.startswith(_PREFIXES) or name in further:
            yield name, value
