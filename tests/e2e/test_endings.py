"""How a run ends that is told to, or that loses one of its processes: in a sentence, with a code, leaving nobody."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import forked
import psutil
import pytest
from harness import (
    files_below,
    finish,
    free_ports,
    kill,
    read_metrics,
    start,
    succeeded,
    train_here,
    train_on_two,
    wait_until,
    weight_bytes,
    write_config,
)

pytestmark = [pytest.mark.attack, pytest.mark.e2e, pytest.mark.distributed]

Measure = Callable[[str, float], None]
TWO = ("--nproc-per-node", "2")


@pytest.fixture
def patient(assets: Path, tmp_path: Path) -> str:
    """An override: the reward `letters`, whose third call waits for the file `go` beside it."""
    file, go = tmp_path / "patient.py", tmp_path / "go"
    source = (assets / "rewards.py").read_text(encoding="utf-8")
    source += f"""
ours = itertools.count(1)

def patient(prompts, completions, references, **columns):
    if next(ours) == 3:
        open({str(file)!r} + f".waits-{{os.getpid()}}", "w").close()
        while not os.path.exists({str(go)!r}):
            time.sleep(0.01)
    return letters(prompts, completions, references)
"""
    file.write_text(source, encoding="utf-8")
    return f"rewards.reward_funcs=['{file}:patient']"


def ranks(run: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes that a launcher has started, by rank."""
    found = {int(child.environ()["RANK"]): child for child in psutil.Process(run.pid).children()}
    return [found[rank] for rank in sorted(found)]


def last_word(store: Path, rank: int) -> bytes:
    """Where a rank was when it last told the others."""
    return store.read_bytes().rpartition(f"chord_megatron/rank_{rank}".encode())[2].partition(b"chord_megatron/")[0]


def waiting(directory: Path, processes: int) -> Callable[[], bool]:
    """Whether all processes are in the third call of `patient`: after two steps and a checkpoint."""
    return lambda: len([*directory.glob("patient.py.waits-*")]) == processes


def sentences(stderr: str) -> list[str]:
    """What a run said at its end: everything on standard error but warnings of libraries."""
    assert "Traceback" not in stderr, stderr
    return [
        line for line in stderr.splitlines() if "ended by SIG" in line or line.startswith(("stopped by ", "error: "))
    ]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named(config: Path, patient: str, tmp_path: Path, victim: int, measure: Measure):
    run = start("chord_megatron.cli", "train", config, patient, *TWO)
    wait_until(waiting(tmp_path, 2), run)
    everyone = psutil.Process(run.pid).children(recursive=True)
    killed = time.monotonic()
    ranks(run)[victim].kill()
    outcome = finish(run)
    measure("seconds from a rank's SIGKILL to the end of the run", time.monotonic() - killed)
    assert outcome.code == 137
    (sentence,) = sentences(outcome.stderr)
    assert sentence.startswith(f"error: rank {victim} was ended by SIGKILL: out of memory?")
    assert psutil.wait_procs(everyone, timeout=60)[1] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_signal_ends_a_run_at_once(
    config: Path, patient: str, tmp_path: Path, number: signal.Signals, processes: str
):
    """In the middle of a step, which is not waited for."""
    run = start("chord_megatron.cli", "train", config, patient, "--nproc-per-node", processes)
    wait_until(waiting(tmp_path, int(processes)), run)
    everyone = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(number)
    outcome = finish(run)
    assert outcome.code == 128 + number
    assert sentences(outcome.stderr) == [
        f"stopped by {number.name} at step 2 (reward); the same command resumes from step 2"
    ]
    assert psutil.wait_procs(everyone, timeout=60)[1] == []
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_2\n"


class OnTerminal(NamedTuple):
    """A command in a terminal of its own."""

    run: subprocess.Popen[str]
    ctrl_c: Callable[[], object]
    shown: Callable[[], str]  # waits for its end


def start_on_terminal(*arguments: str | Path) -> OnTerminal:
    """`python -m chord_megatron.cli ARGUMENTS`, where lines have 80 columns."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    run = subprocess.Popen(
        [sys.executable, "-m", "chord_megatron.cli", *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
        env={**os.environ, **forked.ENVIRONMENT, "TERM": "xterm"},
        text=True,
    )
    os.close(theirs)
    pool = ThreadPoolExecutor(max_workers=1)  # a terminal holds little that nobody has read
    shown = pool.submit(_read_all, ours)
    pool.shutdown(wait=False)
    return OnTerminal(run, lambda: os.write(ours, b"\x03"), shown.result)


def _read_all(terminal: int) -> str:
    parts = []
    with suppress(OSError):  # nobody has the other side any more
        while part := os.read(terminal, 4096):
            parts.append(part)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(parts).decode(errors="replace"))


def imports_torch(run: subprocess.Popen[str], processes: int) -> Callable[[], bool]:
    """Whether the run, or each process that it has started, is about to."""

    def is_there() -> bool:
        mine = psutil.Process(run.pid)
        them = [mine] if processes == 1 else mine.children()
        return len(them) == processes and all("libtorch" in Path(f"/proc/{p.pid}/maps").read_text() for p in them)

    return is_there


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("moment", ["imports", "step 2"])
def test_ctrl_c_is_one_sentence(config: Path, patient: str, tmp_path: Path, moment: str, processes: int):
    """At a terminal, which sends it to every process of the foreground; also where nothing has begun."""
    run, ctrl_c, shown = start_on_terminal("train", config, patient, "--nproc-per-node", str(processes))
    reached = imports_torch(run, processes) if moment == "imports" else waiting(tmp_path, processes)
    wait_until(reached, run)
    ctrl_c()
    text = shown()
    assert run.wait(timeout=60) == 130
    assert "Traceback" not in text and "KeyboardInterrupt" not in text
    (sentence,) = [line for line in text.splitlines() if "stopped by" in line]
    assert sentence.removeprefix("^C").strip() == (
        "stopped by SIGINT before the run began; the same command starts it"
        if moment == "imports"
        else "stopped by SIGINT at step 2 (reward); the same command resumes from step 2"
    )
    if moment == "step 2":  # both steps are still there, whole
        # A bar that a slow machine showed before is rubbed out by what was taken from the text here.
        lines = re.findall(r"step \d+ \(\d+ of 6\) \|.*", text)
        assert [line.split(" | ")[0] for line in lines] == ["step 0 (1 of 6)", "step 1 (2 of 6)"]
        assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("told", ["launcher", "rank 1"])
def test_a_checkpoint_comes_first_if_asked_for(config: Path, patient: str, assets: Path, tmp_path: Path, told: str):
    """All ranks stop after the same step, and the run that goes on is the undisturbed one, bit by bit."""
    options = (patient, "train.save_on_signal=true")
    run = start("chord_megatron.cli", "train", config, *options, *TWO)
    wait_until(waiting(tmp_path, 2), run)
    (run if told == "launcher" else ranks(run)[1]).send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    outcome = finish(run)
    assert outcome.code == 143
    assert sentences(outcome.stderr) == [
        "stopped by SIGTERM before step 3, with a checkpoint; the same command resumes from step 3"
    ]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_3\n"

    succeeded(train_on_two(config, *options))
    (tmp_path / "undisturbed").mkdir()
    other = write_config(assets, tmp_path / "undisturbed")
    succeeded(train_on_two(other, patient))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "undisturbed" / "run")
    assert weight_bytes(tmp_path / "run", 6) == weight_bytes(tmp_path / "undisturbed" / "run", 6)


def test_a_checkpoint_is_not_saved_inside_a_generation_batch(config: Path, patient: str, tmp_path: Path):
    """It could not be resumed: the run goes on to the batch's end."""
    options = (
        patient,
        "train.save_on_signal=true",
        "grpo.num_iterations=2",
        "train.save_steps=null",
        "train.train_iters=8",
    )
    run = start("chord_megatron.cli", "train", config, *options, "train.train_iters=8")
    wait_until(waiting(tmp_path, 1), run)  # the third batch waits for its rewards
    run.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    assert finish(run).code == 143
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_6\n"


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_second_run_in_the_directory_is_refused(config: Path, patient: str, tmp_path: Path, processes: str):
    """It leaves every file as it is; and when the first is killed, the same command goes on at once."""
    first = start("chord_megatron.cli", "train", config, patient)
    wait_until(waiting(tmp_path, 1), first)
    before = files_below(tmp_path / "run")
    second = finish(start("chord_megatron.cli", "train", config, patient, "--nproc-per-node", processes))
    assert second.code == 2
    (sentence,) = sentences(second.stderr)
    assert sentence.startswith(f"error: {tmp_path / 'run'} is in use by process {first.pid} on ")
    after = files_below(tmp_path / "run")
    assert after.pop("lock")[0] == before.pop("lock")[0]  # whose time is the first run's sign of life
    assert after == before
    kill(first)
    (tmp_path / "go").touch()
    outcome = succeeded(train_here(config, patient))
    assert f"resuming {tmp_path / 'run'} at step 2" in outcome.stdout
    assert not (tmp_path / "run" / "lock").exists()


@pytest.mark.slow
def test_a_rank_that_stops_answering_is_named_and_waited_for_as_long_as_configured(
    config: Path, patient: str, tmp_path: Path, measure: Measure
):
    options = (patient, "parallel.distributed_timeout_minutes=1")
    run = start("chord_megatron.cli", "train", config, *options, *TWO)
    wait_until(waiting(tmp_path, 2), run)
    frozen = ranks(run)[1]
    store = Path(frozen.environ()["CHORD_STORE_FILE"])
    wait_until(lambda: b'"reward", 2' in last_word(store, rank=1), run)
    frozen.suspend()
    (tmp_path / "go").touch()
    since = time.monotonic()
    outcome = finish(run)
    measure("seconds from a rank's SIGSTOP to the end of a run with a limit of 60 s", time.monotonic() - since)
    assert outcome.code == 1
    assert "Traceback" not in outcome.stderr
    late = r"rank 1 has given no sign of life for \d+ s, last in reward of step 2: stopped, or its node lost\?"
    assert re.search(late, outcome.stderr)
    (error,) = outcome.errors
    assert error.startswith(
        "error: rank 0 has lost another rank, or got no answer from it within parallel.distributed_"
    )
    assert not frozen.is_running()


@pytest.mark.slow
def test_a_node_that_never_comes_is_named(config: Path, measure: Measure):
    options = ("parallel.distributed_timeout_minutes=0.5", "--nnodes", "2", "--master-port", str(free_ports(1)[0]))
    since = time.monotonic()
    outcome = finish(start("chord_megatron.cli", "train", config, *options))
    measure("seconds until a run whose limit is 30 s gives up a node", time.monotonic() - since)
    assert outcome.code == 1
    assert re.search(r"rank 1 has not come for \d+ s: has its node started\?", outcome.stderr)
    assert "Traceback" not in outcome.stderr


def test_a_mistake_of_one_rank_alone_is_said_at_once(config: Path, tmp_path: Path, measure: Measure):
    """As on a node where a file is missing: rank 1 refuses, while rank 0 knows nothing of it and goes on."""
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    since = time.monotonic()
    innocent = start("chord_megatron.train", config, env={**job, "RANK": "0", "LOCAL_RANK": "0"}, log=tmp_path)
    mistaken = start(
        "chord_megatron.train", config, "data.dataset=none.jsonl", env={**job, "RANK": "1", "LOCAL_RANK": "1"}
    )
    outcome = finish(mistaken)
    measure("seconds until rank 1 has said what it alone refuses", time.monotonic() - since)
    assert innocent.poll() is None
    kill(innocent)
    assert outcome.code == 2
    (error,) = outcome.errors
    assert error.startswith("error: cannot read none.jsonl: No such file")
