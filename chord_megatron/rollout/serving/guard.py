"""The door of a rollout server: every route wants the token, few routes exist, and none samples with doubtful weights.

A pure ASGI middleware around vLLM's application. `GUARDED` is what the trainer needs of vLLM's routes; all others,
among them vLLM's remote procedure calls, are closed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
from typing import Any, Literal
from uuid import uuid4

from chord_megatron.rollout.updates.agreement import (
    FINISH_UPDATE,
    GENERATE,
    JOIN_GROUP,
    PAUSE,
    RESET_PREFIX_CACHE,
    RESTART,
    RESUME,
    START_UPDATE,
    STATUS,
    TOKEN_VARIABLE,
    UPDATE,
    WORLD_SIZE,
    read_token,
)

IDENTITY_VARIABLE = "CHORD_SERVER_IDENTITY"  # JSON, set by `serve`
RESTART_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h

_WEIGHTS = (START_UPDATE, UPDATE, FINISH_UPDATE)
GUARDED = (GENERATE, PAUSE, RESUME, RESET_PREFIX_CACHE, WORLD_SIZE, JOIN_GROUP, *_WEIGHTS)

# unsynced: no trainer has sent weights yet. failed: an update broke off; only a restart mends it.
State = Literal["unsynced", "updating", "ready", "failed"]


class ServerGuard:
    """Answers /chord/*, refuses requests without the token (401), and generation before a complete update (409)."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._token = hashlib.sha256(read_token().encode()).digest()
        self._identity = json.loads(os.environ.get(IDENTITY_VARIABLE, "{}"))
        self._instance = uuid4().hex
        self._state: State = "unsynced"

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        path = scope["path"]
        if not self._has_token(scope["headers"]):
            return await _answer(send, 401, {"error": f"send the bearer token of {TOKEN_VARIABLE}"})
        if path == STATUS:
            return await _answer(send, 200, self._status())
        if path == RESTART and scope["method"] == "POST":
            await _answer(send, 202, {"state": "restarting"})
            asyncio.get_running_loop().call_later(0.1, os._exit, RESTART_EXIT_CODE)
            return None
        if path == "/chord/health":
            scope = {**scope, "path": "/health", "raw_path": b"/health"}  # of the engine, which vLLM asks
        elif path not in GUARDED:
            return await _answer(send, 404, {"error": f"{path} is not served here"})
        elif path == GENERATE and self._state != "ready":
            return await _answer(send, 409, {"error": f"the weights are {self._state}; send a complete update first"})
        if path in _WEIGHTS:
            return await self._update(path, scope, receive, send)
        return await self._app(scope, receive, send)

    async def _update(self, path: str, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Follow an update through vLLM's own routes: from its start to its finish no token is sampled."""
        begins = path == START_UPDATE
        if self._state not in (("unsynced", "ready") if begins else ("updating",)):
            return await _answer(send, 409, {"error": f"{path}: the weights are {self._state}"})
        self._state = "updating"
        status = 500

        async def observe(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status != 200:
                    self._state = "failed"
                elif path == FINISH_UPDATE:
                    self._state = "ready"
            await send(message)

        try:
            await self._app(scope, receive, observe)
        finally:
            if status != 200:  # also where the application raised, or the sender went away
                self._state = "failed"

    def _status(self) -> dict[str, Any]:
        return {"state": self._state, "instance": self._instance, "identity": self._identity}

    def _has_token(self, headers: list[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in headers if name == b"authorization"]
        if len(given) != 1:  # of two, a proxy in between may have looked at the other one
            return False
        scheme, _, token = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(hashlib.sha256(token).digest(), self._token)


async def _answer(send: Any, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"connection", b"close"))  # a body may follow for ever
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
