"""The processes of a run on a machine, with stand-ins for the training program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed import FileStore

from chord_megatron.system.launcher import Launch, run_processes

pytestmark = pytest.mark.attack
TWO = Launch(nproc_per_node=2)


def run(program: str) -> int:
    """The program's rank is `rank`."""
    head = "import os, signal, sys, time; rank = int(os.environ['RANK'])"
    return run_processes(TWO, [sys.executable, "-c", f"{head}\n{program}"], finishes_its_step=False)


def test_all_that_end_well_end_well():
    assert run("sys.exit(0)") == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_that_fails_ends_the_others_and_its_code_is_the_run_s(rank: int, capfd: pytest.CaptureFixture[str]):
    assert run(f"if rank == {rank}: sys.exit(2)\ntime.sleep(3600)") == 2
    assert capfd.readouterr().err == ""


def test_who_was_ended_by_a_signal_is_named(capfd: pytest.CaptureFixture[str]):
    assert run("if rank == 1: os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(3600)") == 139
    assert capfd.readouterr().err == "error: rank 1 was ended by SIGSEGV\n"


def test_places_are_torchrun_s():
    launch = Launch(nproc_per_node=2, nnodes=3, node_rank=1, master_addr="node0", master_port=1234)
    with launch.meeting() as meeting:
        places = launch.places(meeting)
    shared = {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "CHORD_LAUNCHER": str(os.getpid())}
    shared |= {"MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    assert places == {
        2: {**shared, "RANK": "2", "LOCAL_RANK": "0"},
        3: {**shared, "RANK": "3", "LOCAL_RANK": "1"},
    }


def test_where_the_processes_of_a_machine_meet_is_the_user_s_alone_and_goes():
    with TWO.meeting() as meeting:
        place = meeting["CHORD_STORE_FILE"]
        assert os.stat(os.path.dirname(place)).st_mode & 0o077 == 0
        store, other = (FileStore(place, 2) for _ in range(2))
        store.set("key", "value")
        assert other.get("key") == b"value"
    assert not os.path.exists(place)


def test_a_launcher_that_is_killed_leaves_nothing_of_it(tmp_path: Path):
    program = """
from chord_megatron.system.launcher import Launch
import os, signal
with Launch(nproc_per_node=2).meeting():
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)})
    assert killed.returncode == -signal.SIGKILL
    assert [*tmp_path.iterdir()] == []


TRAIN = """
from chord_megatron.system.launcher import Launch, run_processes
os.environ["PYTHONPATH"] = sys.argv[1]
run_processes(Launch(nproc_per_node=2), [sys.executable, "-m", "chord_megatron.train"], finishes_its_step=False)
"""
SERVE = """
from chord_megatron.rollout.serving.serve import _supervise
command = [sys.executable, "-m", "chord_megatron.rollout.serving.vllm_server"]
_supervise(command, {**os.environ, "PYTHONPATH": sys.argv[1]})
"""


@pytest.mark.parametrize(("program", "processes"), [(TRAIN, 2), (SERVE, 1)], ids=["train", "serve"])
def test_nobody_outlives_a_launcher_that_is_killed_while_they_import(program: str, processes: int, tmp_path: Path):
    """Importing torch takes long on a busy machine; here for ever."""
    source = f"import os, time; os.mkdir({str(tmp_path)!r} + f'/imports-{{os.getpid()}}'); time.sleep(3600)"
    (tmp_path / "torch.py").write_text(source)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    launcher = subprocess.Popen([sys.executable, "-c", f"import os, sys{program}", path])
    while len(started := [*tmp_path.glob("imports-*")]) < processes:
        assert launcher.poll() is None
        time.sleep(0.01)
    children = [psutil.Process(int(folder.name.removeprefix("imports-"))) for folder in started]
    launcher.kill()
    launcher.wait()
    alive = psutil.wait_procs(children, timeout=20)[1]
    for child in alive:
        child.kill()
    assert alive == []


def test_nothing_that_a_server_has_started_outlives_its_launcher(tmp_path: Path):
    """As vLLM's engine, which holds the memory of the GPUs and does not ask for its parent's end."""
    child = tmp_path / "child"
    (tmp_path / "torch.py").write_text(f"""
import os, subprocess, time
open({str(child)!r} + ".new", "w").write(str(subprocess.Popen(["sleep", "3600"]).pid))
os.rename({str(child)!r} + ".new", {str(child)!r})
time.sleep(3600)
""")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    launcher = subprocess.Popen([sys.executable, "-c", f"import os, sys{SERVE}", path])
    while not child.exists():
        assert launcher.poll() is None
        time.sleep(0.01)
    engine = psutil.Process(int(child.read_text()))
    launcher.kill()
    launcher.wait()
    alive = psutil.wait_procs([engine], timeout=20)[1]
    for process in alive:
        process.kill()
    assert alive == []
