"""What the processes of a run have in common."""

from __future__ import annotations

import os
import sys

import pytest

from chord_megatron.system.processes import listen_on_loopback


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
