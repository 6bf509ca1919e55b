"""The last step's metrics for Prometheus, at http://HOST:PORT/metrics: nothing is sent, whoever asks is told."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from chord_megatron.system.errors import UserError
from chord_megatron.system.listening import listen_at

_SECONDS_TO_ASK = 5  # then the next one has its turn


class Prometheus:
    """A server of rank 0, at that address alone. Raises UserError where it cannot listen there."""

    def __init__(self, host: str, port: int) -> None:
        listening = listen_at(host, port)
        if listening is None:
            raise UserError(f"tracking.prometheus_host={host} is no address of this machine; name one of its own")
        self.address = f"http://{host}:{port}/metrics"
        self._gauges: dict[str, float] = {}
        self._server = HTTPServer(listening.getsockname()[:2], _handler(self._gauges), bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listening
        threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """What is told from now on; a metric that the step lacks keeps its last value."""
        self._gauges |= {gauge_name(tag): value for tag, value in {"step": step, **values}.items()}

    def text(self, step: int, tag: str, text: str) -> None:
        """It has numbers alone."""

    def table(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """It has numbers alone."""

    def artifact(self, path: Path) -> None:
        """It has numbers alone."""

    def close(self, *, failed: bool) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def gauge_name(tag: str) -> str:
    """chord_expert_p_0_0 for expert_p/0.0: letters, digits and underscores."""
    return "chord_" + re.sub(r"[^a-zA-Z0-9_]", "_", tag)


def exposition(gauges: Mapping[str, float]) -> str:
    """Prometheus's text format 0.0.4."""
    return "".join(f"# TYPE {name} gauge\n{name} {value!r}\n" for name, value in gauges.items())


def _handler(gauges: dict[str, float]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _SECONDS_TO_ASK

        def do_GET(self) -> None:
            body = exposition(dict(gauges)).encode() if self.path == "/metrics" else b"it is at /metrics\n"
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """The console is the run's."""

    return Handler
