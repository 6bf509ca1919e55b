"""Connections that have not sent the headers of a request yet, and so no token: few, short-lived, of few bytes.

uvicorn holds them without a limit of any kind. What follows is the guard's: it closes those without the token. Nor has
uvicorn a limit for answers at its own end.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, ClassVar

from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.auto import AutoHTTPProtocol

SECONDS_FOR_HEADERS = 10.0
SECONDS_FOR_ANSWERS = 10.0  # at the end of the server
MOST_WAITING = 1000  # a trainer opens rollout.max_batch_size connections at once, and each waits for a moment
MOST_BYTES = 2**16

_Protocol: Any = AutoHTTPProtocol  # of a class that is chosen by what is installed


def bound_connections() -> None:
    """Let every uvicorn of this process, whose user does not choose another protocol, have these connections."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:BoundedConnection"


class BoundedConnection(_Protocol):
    """uvicorn's; dropped where its first request does not come in time, and the oldest where too many wait."""

    _waiting: ClassVar[dict[BoundedConnection, asyncio.TimerHandle]] = {}  # oldest first

    def connection_made(self, transport: asyncio.Transport) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._bytes = 0
        self._waiting[self] = asyncio.get_running_loop().call_later(SECONDS_FOR_HEADERS, transport.abort)
        if len(self._waiting) > MOST_WAITING:
            next(iter(self._waiting)).drop()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        if self in self._waiting:
            self._bytes += len(data)
            if self.cycle is not None:  # uvicorn's, from the end of the headers on
                self._wait_no_more()
            elif self._bytes > MOST_BYTES:
                self.drop()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._wait_no_more()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Called by uvicorn at its end, which then waits for answers without a limit; a dead engine gives none."""
        super().shutdown()
        asyncio.get_running_loop().call_later(SECONDS_FOR_ANSWERS, os._exit, 1)

    def drop(self) -> None:
        """Close it at once."""
        self._wait_no_more()
        self.transport.abort()

    def _wait_no_more(self) -> None:
        if timer := self._waiting.pop(self, None):
            timer.cancel()
