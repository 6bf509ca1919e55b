"""On one machine a run listens to nobody else: the sockets of all its processes, read while it goes on."""

from __future__ import annotations

import ipaddress
import subprocess
from pathlib import Path

import psutil
import pytest
from harness import finish, start, succeeded

LISTENING = psutil.CONN_LISTEN


def listeners(process: subprocess.Popen[str]) -> set[str]:
    """Addresses at which a command and its descendants listened, at any time until its end."""
    seen: set[str] = set()
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for member in family:
            try:
                connections = member.net_connections(kind="inet")
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            seen |= {connection.laddr.ip for connection in connections if connection.status == LISTENING}
    return seen


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2])
def test_training_listens_on_the_loopback_device_alone(config: Path, tmp_path: Path, processes: int):
    run = start("chord_megatron.cli", "train", config, "--nproc-per-node", str(processes), log=tmp_path)
    seen = listeners(run)
    succeeded(finish(run))
    assert [address for address in seen if not ipaddress.ip_address(address).is_loopback] == []
    assert seen or processes == 1, "gloo's own sockets are not seen: the test looks at the wrong processes"
