"""Requests to one rollout server, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from chord_megatron.rollout.updates.agreement import TOKEN_VARIABLE
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import one_line

Json = dict[str, Any]

_CONNECT_SECONDS = 5.0


class ServerError(Exception):
    """One server failed; another may do."""


@dataclass
class Server:
    """What is known of one server."""

    url: str
    version: int | None = None  # of its weights; None: out of service
    in_flight: int = 0
    instance: str | None = None  # which start of the server was seen last
    failed_instance: str | None = None  # a start that must not be used again
    failure: str = "never reached"


class ServerClient:
    """Sends the token with every request."""

    def __init__(self, token: str, *, timeout: float) -> None:
        """`timeout`: seconds for an answer."""
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout, connect=_CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,  # no proxy: the token is for the servers alone
        )

    async def close(self) -> None:
        """Drop all connections."""
        await self._client.aclose()

    async def get(self, server: Server, path: str, **options: Any) -> Json:
        """See `post`."""
        return await self._request("GET", server, path, **options)

    async def post(self, server: Server, path: str, body: Json | None = None, **options: Any) -> Json:
        """The answer's JSON. Raises UserError for what no server would do, ServerError for what this one did not."""
        return await self._request("POST", server, path, json=body, **options)

    async def _request(self, method: str, server: Server, path: str, **options: Any) -> Json:
        try:
            response = await self._client.request(method, server.url + path, **options)
        except httpx.HTTPError as error:
            raise ServerError(f"{path}: {type(error).__name__} {error}".rstrip()) from None
        if response.status_code == 401:
            raise UserError(f"{server.url} refuses the token; set the {TOKEN_VARIABLE} that it was started with")
        text = one_line(response.text)
        if response.status_code in (400, 404, 422):
            raise UserError(f"{server.url} refuses {path}: {text}; is it a `chord-megatron serve` of this release?")
        if not response.is_success:
            raise ServerError(f"{path}: {response.status_code} {text}")
        return response.json()


def check_identity(url: str, ours: Json, theirs: Json) -> None:
    """Raises UserError where the server was started for another model."""
    for key in ("architecture", "dtype", "tokenizer_sha256"):
        mine, other = ours[key], theirs.get(key)
        if mine == other:
            continue
        what = key
        if key == "architecture" and isinstance(other, dict):
            what = next((name for name in mine if mine[name] != other.get(name)), key)
            mine, other = mine.get(what), other.get(what)
        raise UserError(
            f"{url} serves another model: its {what} is {other}, the trainer's {mine}; start it with the trainer's "
            "model directory and model.dtype"
        )
