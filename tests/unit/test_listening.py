"""Where the processes of a machine listen, and which hosts are this machine alone."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from chord_megatron.system.errors import UserError
from chord_megatron.system.listening import is_loopback, listen_at, listen_on_loopback


@pytest.fixture
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


@pytest.mark.skipif(sys.platform != "linux", reason="the names are Linux's")
def test_gloo_and_nccl_are_told_the_loopback_device(no_choice: None):
    listen_on_loopback(nccl=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"  # = : this name, not what begins with it


def test_nccl_can_be_left_out(no_choice: None):
    listen_on_loopback(nccl=False)
    assert "NCCL_SOCKET_IFNAME" not in os.environ


def test_what_the_user_has_chosen_stays(no_choice: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    listen_on_loopback(nccl=True)
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth7", "^docker")


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        ("127.0.0.1", True),
        ("127.3.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("node0", False),
    ],
)
def test_which_hosts_only_this_machine_reaches(host: str, answer: bool):
    assert is_loopback(host) is answer


def test_a_listener_is_at_its_address_alone_and_its_port_is_taken():
    listener = listen_at("127.0.0.1", 0)
    assert listener is not None
    with listener:
        address, port = listener.getsockname()
        assert address == "127.0.0.1"
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is taken, by another run?"):
            listen_at("127.0.0.1", port)


def test_nowhere_alone_where_the_others_would_not_reach_it(monkeypatch: pytest.MonkeyPatch):
    """A name that /etc/hosts gives to the loopback device, as Debian does; an address of another machine; no name."""
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 29500))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    assert listen_at("node0", 29500) is None
    monkeypatch.undo()
    assert listen_at("203.0.113.7", 29500) is None
    assert listen_at("no.such.host.invalid", 29500) is None
