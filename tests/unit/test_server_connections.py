"""Connections of a rollout server before their token: held for a time and in a number that are bounded."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from threading import Thread
from typing import Any

import pytest

pytestmark = [
    pytest.mark.attack,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("uvicorn") is None, reason="needs vLLM, which brings its server: make vllm"),
]

TOKEN = "correct horse battery"
GOOD = f"GET /chord/status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
HALF = b"GET /chord/status HTTP/1.1\r\nHost: x\r\nX-Long: "


async def engine(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Only starts and ends with the server."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Starts the guard behind vLLM's kind of server; returns its port."""
    import uvicorn

    from chord_megatron.rollout.serving import connections
    from chord_megatron.rollout.serving.guard import TOKEN_VARIABLE, ServerGuard

    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    stack = contextlib.ExitStack()

    def start(*, seconds: float, most: int) -> int:
        monkeypatch.setattr(connections, "SECONDS_FOR_HEADERS", seconds)
        monkeypatch.setattr(connections, "MOST_WAITING", most)
        connections.bound_connections()
        server = uvicorn.Server(uvicorn.Config(ServerGuard(engine), port=0, log_level="error", timeout_keep_alive=600))
        listener = socket.create_server(("127.0.0.1", 0))
        thread = Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()

        def stop() -> None:
            server.should_exit = server.force_exit = True
            thread.join()
            listener.close()

        stack.callback(stop)
        wait_until(lambda: server.started)
        return listener.getsockname()[1]

    yield start
    stack.close()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def open_half(port: int, number: int, content: bytes = HALF) -> list[socket.socket]:
    opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(number)]
    for connection in opened:
        connection.sendall(content)
        connection.setblocking(False)
    return opened


def is_closed(connection: socket.socket) -> bool:
    """By the other side."""
    try:
        return not connection.recv(1000)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def answer(port: int, request: bytes) -> bytes:
    """All that the server sends until it closes the connection, or has sent a status of its own."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(1000):
            received += chunk
            if b'"state"' in received:
                break
        return received


def test_half_a_request_is_held_for_a_time(serve: Callable[..., int], measure: Callable[[str, int], None]) -> None:
    """Also where it drips: 600 of them, some with no byte at all."""
    port = serve(seconds=3, most=1000)
    opened = open_half(port, 300) + open_half(port, 300, b"")
    assert answer(port, GOOD).startswith(b"HTTP/1.1 200")

    def all_closed() -> bool:
        nonlocal opened
        opened = [connection for connection in opened if not is_closed(connection)]
        for connection in opened[:10]:
            with contextlib.suppress(OSError):
                connection.send(b"x")
        return not opened

    wait_until(all_closed)
    measure("connections without a token, none held", 600)


def test_only_so_many_half_requests_are_held(serve: Callable[..., int], measure: Callable[[str, int], None]) -> None:
    """The oldest go, so that whoever has a token gets in."""
    port = serve(seconds=600, most=20)
    opened = open_half(port, 100)
    assert answer(port, GOOD).startswith(b"HTTP/1.1 200")
    wait_until(lambda: sum(map(is_closed, opened)) >= 80)
    measure("connections without a token, none held", 80)
    assert [is_closed(connection) for connection in opened[-19:]] == [False] * 19


def test_a_request_with_a_token_may_take_its_time(serve: Callable[..., int]) -> None:
    """And its connection is kept, however many wait for others."""
    port = serve(seconds=0.5, most=5)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        for _ in range(3):
            connection.sendall(GOOD)
            received = b""
            while not received.endswith(b"}"):
                received += connection.recv(1000)
            assert received.startswith(b"HTTP/1.1 200")
            for half in open_half(port, 20):
                wait_until(lambda half=half: is_closed(half))


def test_headers_have_a_length(serve: Callable[..., int]) -> None:
    port = serve(seconds=600, most=20)
    (connection,) = open_half(port, 1)

    def send_more() -> bool:
        with contextlib.suppress(BlockingIOError):
            try:
                connection.send(b"x" * 10_000)
            except ConnectionError:
                return True
        return is_closed(connection)

    wait_until(send_more)


@pytest.mark.parametrize("body", [b"Content-Length: 1000000\r\n\r\nx", b"Transfer-Encoding: chunked\r\n\r\n5\r\nxx"])
def test_without_a_token_the_connection_ends(
    serve: Callable[..., int], body: bytes, measure: Callable[[str, int], None]
) -> None:
    """What follows its headers is not waited for."""
    port = serve(seconds=600, most=20)
    for authorization in (b"", b"Authorization: Bearer wrong\r\n"):
        request = b"POST /inference/v1/generate HTTP/1.1\r\nHost: x\r\n" + authorization + body
        assert answer(port, request).startswith(b"HTTP/1.1 401")
        measure("requests without a token, all refused", 1)


DYING = """
import asyncio, socket
import uvicorn
from chord_megatron.rollout.serving import connections

connections.SECONDS_FOR_ANSWERS = 0.5

async def engine(scope, receive, send):
    if scope["type"] == "http":
        server.should_exit = True
        await asyncio.Event().wait()
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()

connections.bound_connections()
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
server = uvicorn.Server(uvicorn.Config(engine, log_level="error"))
asyncio.run(server.serve(sockets=[listener]))
"""


def test_a_server_ends_though_its_engine_never_answers() -> None:
    """As vLLM's where its engine has died: a request is under way, and nobody would start another server."""
    server = subprocess.Popen([sys.executable, "-c", DYING], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        with socket.create_connection(("127.0.0.1", int(server.stdout.readline())), timeout=60) as connection:
            connection.sendall(GOOD)
            assert server.wait(timeout=60) == 1
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
