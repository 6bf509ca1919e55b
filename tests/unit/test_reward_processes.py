"""The process of a user's reward function: what it starts ends with it, what it sees, and how much it may take."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chord_megatron.rewards import build_reward_function, worker
from chord_megatron.system.errors import UserError

pytestmark = pytest.mark.attack

TWO = (["p", "q"], ["aa", "b"], ["1", "2"], [{}, {}])
# A child by fork, which holds every pipe that its parent does, and one by exec; both would outlive the tests.
STARTS_TWO = """
import os, re, subprocess, time
def start(path):
    forked = os.fork()
    if forked == 0:
        time.sleep(1000)
        os._exit(0)
    started = subprocess.Popen(["sleep", "1000"])
    with open(path + ".partial", "w") as file:
        file.write(f"{os.getpid()} {forked} {started.pid}")
    os.rename(path + ".partial", path)
"""
# Holds the interpreter's lock: no thread of the process can do anything meanwhile.
HOLDS_THE_LOCK = "re.match(r'(a+)+$', 'a' * 60 + 'b')"


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Builds rewards from the source of a user's file; every process of theirs is ended after the test."""
    built = []

    def build(source: str, *, timeout_seconds: float = 60, weights: list[float] | None = None, **limits: Any) -> Any:
        (tmp_path / "mine.py").write_text(source)
        rewards = build_reward_function([f"{tmp_path}/mine.py:f"], weights, timeout_seconds, **limits)
        built.append(rewards)
        return rewards

    yield build
    for rewards in built:
        rewards.close()


def refusal(rewards: Any) -> str:
    with pytest.raises(UserError) as error:
        rewards(*TWO)
    return str(error.value)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie, which nobody may be there to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def started(path: Path) -> list[int]:
    """The processes of STARTS_TWO."""
    wait_until(path.exists)
    return [int(pid) for pid in path.read_text().split()]


# --- what a function starts -----------------------------------------------------------------------------------------


def test_a_function_that_forks_answers_once(plugin: Callable[..., Any]) -> None:
    """The child that returns first would answer for this call, and its parent's answer for the next one."""
    rewards = plugin(
        "import os\ncalls = 0\n"
        "def f(completions):\n"
        "    global calls; calls += 1\n"
        "    child = os.fork()\n"
        "    if child == 0: return [-1.0] * len(completions)\n"
        "    os.waitpid(child, 0)\n"
        "    child = os.fork()\n"
        "    if child == 0: raise ValueError('in the child')\n"
        "    os.waitpid(child, 0)\n"
        "    return [calls] * len(completions)\n"
    )
    assert [rewards(*TWO).total for _ in range(3)] == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


def test_at_a_time_out_all_ends(plugin: Callable[..., Any], tmp_path: Path) -> None:
    rewards = plugin(
        STARTS_TWO + f"def f(completions):\n    start({str(tmp_path / 'pids')!r}); {HOLDS_THE_LOCK}\n",
        timeout_seconds=5,
    )
    assert refusal(rewards).endswith("mine.py:f: no answer within rewards.timeout_seconds=5")
    wait_until(lambda: not any(map(is_running, started(tmp_path / "pids"))))


def test_with_close_all_ends(plugin: Callable[..., Any], tmp_path: Path) -> None:
    rewards = plugin(STARTS_TWO + f"def f(completions):\n    start({str(tmp_path / 'pids')!r}); return [1, 2]\n")
    assert rewards(*TWO).total == [1.0, 2.0]
    assert all(map(is_running, started(tmp_path / "pids")))
    rewards.close()
    wait_until(lambda: not any(map(is_running, started(tmp_path / "pids"))))


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("os._exit(7)", "its process ended with exit code 7"),
        ("os.kill(os.getpid(), 9)", "its process was ended by SIGKILL: out of memory?"),
        ("os.kill(os.getpid(), 11)", "its process was ended by SIGSEGV"),
    ],
)
def test_a_process_that_ends_is_noticed_though_its_child_holds_the_pipe(
    plugin: Callable[..., Any], tmp_path: Path, end: str, reason: str
) -> None:
    rewards = plugin(STARTS_TWO + f"def f(completions):\n    start({str(tmp_path / 'pids')!r}); {end}\n")
    assert refusal(rewards).endswith(f"mine.py:f: {reason}")
    wait_until(lambda: not any(map(is_running, started(tmp_path / "pids"))))
    assert refusal(rewards).endswith("its process has ended")


@pytest.mark.parametrize("call", ["time.sleep(1000)", HOLDS_THE_LOCK])
def test_all_ends_with_the_trainer(tmp_path: Path, call: str) -> None:
    """Which is killed, while a fork of it (as Megatron-Core's writers of checkpoints) holds its pipes."""
    (tmp_path / "mine.py").write_text(
        STARTS_TWO + f"def f(completions):\n    start({str(tmp_path / 'pids')!r}); {call}\n"
    )
    script = (
        "import os, time\nfrom chord_megatron.rewards import build_reward_function\n"
        f"rewards = build_reward_function(['{tmp_path}/mine.py:f'], None, 600)\n"
        "child = os.fork()\n"
        f"if child == 0: time.sleep(1000)\n"
        f"open({str(tmp_path / 'writer')!r}, 'w').write(str(child))\n"
        "rewards(['p'], ['c'], ['r'], [{}])\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script])
    pids = started(tmp_path / "pids")
    assert all(map(is_running, pids))
    trainer.kill()
    trainer.wait()
    try:
        wait_until(lambda: not any(map(is_running, pids)))
    finally:
        os.kill(int((tmp_path / "writer").read_text()), signal.SIGKILL)


def test_a_signal_to_all_processes_of_a_job_leaves_the_trainer_its_rewards(plugin: Callable[..., Any]) -> None:
    """Slurm sends SIGTERM to all of them, and the trainer still finishes a step and saves."""
    rewards = plugin(
        "import os, signal, time\ndef f(completions):\n"
        "    os.killpg(0, signal.SIGTERM); time.sleep(0.1)\n"
        "    child = os.fork()\n"
        "    if child == 0: time.sleep(1000)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    return [os.WTERMSIG(os.waitpid(child, 0)[1])] * 2\n"
    )
    assert [rewards(*TWO).total for _ in range(2)] == [[15.0, 15.0]] * 2


def test_a_frozen_process_is_noticed(plugin: Callable[..., Any]) -> None:
    """Also before a request that is larger than a pipe is read."""
    rewards = plugin("import os\ndef f(completions): return [os.getpid()] * len(completions)", timeout_seconds=5)
    os.kill(int(rewards(*TWO).total[0]), signal.SIGSTOP)
    with pytest.raises(UserError, match=r"no answer within rewards.timeout_seconds=5$"):
        rewards(["p"], ["x" * 10**7], ["1"], [{}])


def test_it_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    """The package may be where only the trainer looks for it, such as its working directory."""
    (tmp_path / "mine.py").write_text("def f(completions): return [1.0]\n")
    options = {"trainer": os.getpid(), "file": f"{tmp_path}/mine.py", "function_name": "f", "memory_limit_gb": None}
    command = [sys.executable, "-I", "-S", worker.__file__, json.dumps(options)]
    request = json.dumps({"number": 1, "arguments": {"completions": ["a"]}})
    answers = subprocess.run(command, input=request, capture_output=True, text=True, check=True).stdout.splitlines()
    assert json.loads(answers[1]) == {"number": 1, "result": [1.0]}


# --- what it answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "noise", [b"x", b"x\n", b"null\n", b"[]\n", b"{}\n", b'{"number": 0, "result": [5, 5]}\n', b"[" * 10**5 + b"\n"]
)
def test_what_is_no_answer_is_not_taken_for_one(plugin: Callable[..., Any], noise: bytes) -> None:
    """Bytes that a function writes into the pipe of the answers, whose number it may guess."""
    rewards = plugin(
        f"import os\nnoise = {noise!r}\ndef f(completions):\n"
        "    for descriptor in range(3, 20):\n"
        "        try: os.write(descriptor, noise)\n"
        "        except OSError: pass\n"
        "    return [1, 2]\n"
    )
    message = refusal(rewards)
    assert "wrote into the pipe of its answers; leave" in message and "\n" not in message and len(message) < 500


def test_an_answer_has_a_length(plugin: Callable[..., Any]) -> None:
    rewards = plugin("def f(completions): return ['x' * 10**8, 1]")
    assert refusal(rewards).endswith("mine.py:f: its answer is longer than 64 MB; return a list of numbers")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("10**400", "returned 100000000000000000...0000000000000000000, beyond 1e+30, at index 1"),
        ("-(10**400)", "returned -10000000000000000...0000000000000000000, beyond 1e+30, at index 1"),
        ("10**5000", "ValueError: Exceeds the limit (4300 digits) for integer string conversion"),
        ("1e308", "returned 1e+308, beyond 1e+30, at index 1"),
        ("'x' * 1000", f"returned '{'x' * 37}...{'x' * 38}', not a finite number, at index 1"),
    ],
)
def test_numbers_that_no_sum_holds_are_said(plugin: Callable[..., Any], value: str, said: str) -> None:
    message = refusal(plugin(f"def f(completions): return [1.0, {value}]"))
    assert f"mine.py:f{':' if said.startswith('V') else ''} {said}" in message and len(message) < 500


def test_what_cannot_be_written_is_said(plugin: Callable[..., Any]) -> None:
    source = "class Odd:\n    def __repr__(self): raise KeyError('odd')\ndef f(completions): return [Odd(), 1]"
    assert "mine.py:f: KeyError: 'odd'" in refusal(plugin(source))


def test_a_long_reason_is_cut(plugin: Callable[..., Any]) -> None:
    assert len(refusal(plugin("def f(completions): raise ValueError('x' * 10**6)"))) < 3000


# --- what it sees and takes -----------------------------------------------------------------------------------------


def test_it_sees_what_programs_need_and_what_is_named(
    plugin: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = ("HF_TOKEN", "CHORD_SERVER_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "http_proxy")
    useful = ("HF_HOME", "LC_NUMERIC", "PYTHONHASHSEED", "CUDA_VISIBLE_DEVICES", "TZ")
    for name in (*secret, *useful, "JUDGE_KEY"):
        monkeypatch.setenv(name, "UTC" if name == "TZ" else "0")
    source = f"import os\nopen({str(tmp_path / 'seen')!r}, 'w').write(' '.join(os.environ))\ndef f(completions): pass\n"
    plugin(source)
    seen = set((tmp_path / "seen").read_text().split())
    assert seen >= {*useful, "PATH"} and not seen & {*secret, "JUDGE_KEY"}
    plugin(source, environment=["JUDGE_KEY", "ABSENT"])
    assert set((tmp_path / "seen").read_text().split()) == seen | {"JUDGE_KEY"}


def test_a_limit_of_memory_is_an_error_of_the_function(plugin: Callable[..., Any]) -> None:
    source = "def f(completions):\n    return [float(len(bytearray(length))) for length in map(int, completions)]"
    rewards = plugin(source, memory_limit_gb=1)
    columns = (["p"], ["100000000"], ["1"], [{}])
    assert rewards(*columns).total == [1e8]
    with pytest.raises(UserError, match=r"mine.py:f: MemoryError.*mine.py:2\); rewards.memory_limit_gb is 1$"):
        rewards(["p"], ["2000000000"], ["1"], [{}])


def test_a_limit_counts_for_what_a_function_starts(plugin: Callable[..., Any]) -> None:
    rewards = plugin(
        "import subprocess, sys\ndef f(completions):\n"
        "    code = 'try: bytearray(2 * 10**9)\\nexcept MemoryError: print(1)\\nelse: print(2)'\n"
        "    return [int(subprocess.run([sys.executable, '-c', code], capture_output=True).stdout)] * 2\n",
        memory_limit_gb=1,
    )
    assert rewards(*TWO).total == [1.0, 1.0]
