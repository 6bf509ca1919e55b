"""Where this machine's processes listen: no further than others need to reach them."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from chord_megatron.system.errors import UserError


def listen_on_loopback(*, nccl: bool) -> None:
    """Have gloo, and NCCL, listen on the loopback device, unless the user names one.

    By themselves they take the device that this machine's host name stands for, which may be a public one.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    if nccl:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={loopback}")  # without = NCCL takes a prefix


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine as only itself reaches it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen_at(host: str, port: int) -> socket.socket | None:
    """Listen at that address alone; None where it is not this machine's, or a name by which only this machine knows it.

    Raises UserError where somebody has the port.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if is_loopback(str(address[0])) and not is_loopback(host):
            return None
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is taken, by another run? choose another") from None
        return None
