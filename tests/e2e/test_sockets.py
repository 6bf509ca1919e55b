"""On one machine a run listens to nobody else: the sockets of all its processes, read while it goes on."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError

import psutil
import pytest
from harness import finish, free_ports, kill, start, succeeded, wait_until, write_config
from test_vllm_servers import TOKEN

pytestmark = pytest.mark.attack

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm")
Measure = Callable[[str, int], None]
COLOCATED = ("rollout.engine=vllm", "rollout.vllm_mode=colocate", "train.train_iters=2")


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """A command and its descendants."""
    try:
        return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def listening(process: subprocess.Popen[str]) -> set[str]:
    """Addresses at which a command and its descendants listen now, TCP and UDP."""
    found: set[str] = set()
    for member in family(process):
        try:
            connections = member.net_connections(kind="inet")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        found |= {c.laddr.ip for c in connections if c.laddr and not c.raddr and c.status in ("LISTEN", "NONE")}
    return found


def listened(process: subprocess.Popen[str], until: Callable[[], bool] = lambda: False) -> set[str]:
    """Addresses at which they listened at any time until the command's end, or until a condition."""
    seen: set[str] = set()
    while process.poll() is None and not until():
        seen |= listening(process)
        time.sleep(0.02)  # what listens does so for seconds; the processes want the cores
    return seen


def beyond_loopback(addresses: set[str]) -> set[str]:
    return {address for address in addresses if not ipaddress.ip_address(address).is_loopback}


def test_a_listener_beyond_the_loopback_device_is_seen(tmp_path: Path):
    """That of a child, too: what the other tests look for."""
    child = "import socket, time; listener = socket.create_server(('0.0.0.0', 0)); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], text=True, start_new_session=True)
    wait_until(lambda: listening(process) == {"0.0.0.0"}, process)
    kill(process)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2])
def test_training_listens_on_the_loopback_device_alone(config: Path, tmp_path: Path, processes: int, measure: Measure):
    run = start("chord_megatron.cli", "train", config, "--nproc-per-node", str(processes), log=tmp_path)
    seen = listened(run)
    succeeded(finish(run))
    measure("addresses beyond the loopback device at which a run listened", len(beyond_loopback(seen)))
    assert beyond_loopback(seen) == set()
    assert seen or processes == 1, "gloo's own sockets are not seen: the test looks at the wrong processes"


@pytest.mark.distributed
def test_the_doctor_listens_on_the_loopback_device_alone(measure: Measure):
    """While two processes of its own try an all-reduce."""
    program = "from chord_megatron.doctor.all_reduce import time_all_reduce; time_all_reduce('gloo', 200)"
    examination = subprocess.Popen([sys.executable, "-c", program], text=True)
    seen = listened(examination)
    assert examination.returncode == 0
    measure("addresses beyond the loopback device at which a run listened", len(beyond_loopback(seen)))
    assert beyond_loopback(seen) == set() != seen


@pytest.mark.vllm
@needs_vllm
@pytest.mark.slow
def test_a_colocated_engine_listens_on_the_loopback_device_alone(vllm_assets: Path, tmp_path: Path, measure: Measure):
    config = write_config(vllm_assets, tmp_path)
    options = (*COLOCATED, "parallel.tensor_model_parallel_size=2", "rollout.vllm_tensor_parallel_size=2")
    run = start("chord_megatron.cli", "train", config, *options, "--nproc-per-node", "2", log=tmp_path)
    seen = listened(run)
    succeeded(finish(run))
    measure("addresses beyond the loopback device at which a run listened", len(beyond_loopback(seen)))
    assert beyond_loopback(seen) == set() != seen


@pytest.fixture
def server(vllm_assets: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """One of two workers, and its URL."""
    (port,) = free_ports(1)
    options = ("--port", str(port), "--dtype", "float32", "--max-model-len", "64", "--tensor-parallel-size", "2")
    model = vllm_assets / "model"
    command = ("chord_megatron.cli", "serve", model, *options, "--", "--enforce-eager")
    process = start(*command, log=tmp_path, env={"CHORD_SERVER_TOKEN": TOKEN})
    yield process, f"http://127.0.0.1:{port}"
    kill(process)


def answers(url: str) -> bool:
    request = urllib.request.Request(f"{url}/chord/health", headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=10):
            return True
    except (URLError, OSError):
        return False


@pytest.mark.vllm
@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["files", "broadcast"])
def test_a_server_and_its_trainer_listen_on_the_loopback_device_alone(
    server: tuple[subprocess.Popen[str], str], vllm_assets: Path, tmp_path: Path, transfer: str, measure: Measure
):
    process, url = server
    seen = listened(process, until=lambda: answers(url))
    (tmp_path / "trainer").mkdir()
    config = write_config(vllm_assets, tmp_path)
    options = ("rollout.engine=vllm", "rollout.vllm_mode=server", f"rollout.vllm_servers=[{url}]")
    run = start(
        "chord_megatron.cli",
        "train",
        config,
        *options,
        f"rollout.weight_transfer={transfer}",
        "train.train_iters=2",
        "--nproc-per-node",
        "2",
        log=tmp_path / "trainer",
        env={"CHORD_SERVER_TOKEN": TOKEN},
    )
    while run.poll() is None:
        seen |= listening(run) | listening(process)
        time.sleep(0.02)
    assert run.returncode == 0, (tmp_path / "trainer" / "output").read_text()[-2000:]
    measure("addresses beyond the loopback device at which a run listened", len(beyond_loopback(seen)))
    assert beyond_loopback(seen) == set() != seen
