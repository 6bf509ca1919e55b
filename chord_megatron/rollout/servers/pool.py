"""The rollout servers of a run, as rank 0 sees them: requests spread by load, retried elsewhere, updated together.

A server is in service while it holds the weights that were last sent. Whatever goes wrong with one (a timeout, a lost
connection, an error, tokens of other weights) takes it out of service; it is restarted and gets a complete update
before it is asked for another token.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from chord_megatron.rollout.servers.client import Json, Server, ServerClient, ServerError, check_identity
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
    UPDATE,
    WORLD_SIZE,
)
from chord_megatron.system.errors import UserError
from chord_megatron.system.work import Work

T = TypeVar("T")

_STATUS_SECONDS = 10.0
_SECONDS_BETWEEN_LOOKS = 0.5
_ATTEMPTS = 4  # at a completion, on whichever servers are left
_logger = logging.getLogger(__name__)


class UpdateError(UserError):
    """No server took the weights; another attempt may do, once they have restarted."""


class ServerPool:
    """Talks to all servers from an event loop of its own, so that completions can be drawn while the trainer trains."""

    def __init__(
        self,
        urls: Sequence[str],
        token: str,
        identity: Json,
        *,
        timeout: float,
        max_in_flight: int,
        work: Work | None = None,
    ) -> None:
        """`timeout`: seconds for one request, and for a server to come back. `max_in_flight`: requests per server.

        `work`: where is told whom the caller waits for.
        """
        self._work, self._answered = work or Work(), 0
        self._servers = [Server(url.rstrip("/")) for url in urls]
        self._updating: list[Server] = []
        self._version = -1
        self._is_first_update = True
        self._identity, self._timeout, self._max_in_flight = identity, timeout, max_in_flight
        self._client = ServerClient(token, timeout=timeout)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="rollout-servers")
        self._thread.start()

    def close(self) -> None:
        """Drop all connections; the servers run on."""
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- drawing ------------------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Json], version: int) -> Future[list[Json]]:
        """Ask weights of `version` for each completion; the answers (vLLM's GenerateTokensChoice) keep the order.

        The result raises UserError when no server is left.
        """
        return asyncio.run_coroutine_threadsafe(self._generate_all(requests, version), self._loop)

    def wait(self, answers: Future[list[Json]], count: int) -> list[Json]:
        """The result of `submit`, of so many completions; meanwhile tells how many have come."""
        while not futures.wait([answers], timeout=_SECONDS_BETWEEN_LOOKS).done:
            self._work.what, self._work.done, self._work.total = "completions", self._answered, count
        return answers.result()

    def score(self, sequences: Sequence[Sequence[int]], arguments: Json) -> dict[str, list[list[float]]]:
        """Of each server in service the log-probs of each sequence's tokens but its first."""
        return self._run(self._score(sequences, arguments))

    async def _generate_all(self, requests: Sequence[Json], version: int) -> list[Json]:
        room = asyncio.Semaphore(self._max_in_flight * len(self._servers))

        async def one(request: Json) -> Json:
            async with room:
                answer = await self._generate(request, version)
                self._answered += 1
                return answer

        self._answered = 0
        try:
            async with asyncio.TaskGroup() as group:  # the first error cancels the others
                tasks = [group.create_task(one(request)) for request in requests]
        except ExceptionGroup as errors:
            raise UserError(str(errors.exceptions[0])) from errors
        return [task.result() for task in tasks]

    async def _generate(self, request: Json, version: int) -> Json:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(ServerError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            reraise=True,
        ):
            with attempt:
                return await self._ask(self._least_busy(version), request, version)
        raise AssertionError("reraise=True")

    def _least_busy(self, version: int) -> Server:
        serving = [server for server in self._servers if server.version == version]
        if not serving:
            raise UserError(
                f"no rollout server is left: {self._failures()}; see what they print, and start the run again: it "
                "goes on from its latest checkpoint"
            )
        return min(serving, key=lambda server: server.in_flight)

    async def _ask(self, server: Server, request: Json, version: int) -> Json:
        server.in_flight += 1
        try:
            answer = await self._client.post(server, GENERATE, request)
            (choice,) = answer["choices"]
            if choice["finish_reason"] not in ("stop", "length"):
                raise ServerError(f"a completion ended with {choice['finish_reason']}")
            versions = {span["version"] for span in choice["weight_versions"] or ()}
            if versions != {str(version)}:
                raise ServerError(f"tokens came from weights {sorted(versions)} instead of {version}")
            return {**choice, "prompt_logprobs": answer["prompt_logprobs"]}
        except ServerError as error:
            self._take_out(server, str(error))
            raise
        finally:
            server.in_flight -= 1

    async def _score(self, sequences: Sequence[Sequence[int]], arguments: Json) -> dict[str, list[list[float]]]:
        scores = {}
        for server in [server for server in self._servers if server.version is not None]:
            try:
                answers = [
                    await self._ask(server, {"token_ids": list(tokens), "sampling_params": arguments}, self._version)
                    for tokens in sequences
                ]
            except ServerError:
                continue  # out of service by now
            scores[server.url] = [
                [entry[str(token)]["logprob"] for token, entry in zip(tokens[1:], answer["prompt_logprobs"][1:])]
                for tokens, answer in zip(sequences, answers, strict=True)
            ]
        self._least_busy(self._version)  # raises where none is left
        return scores

    # --- updating -----------------------------------------------------------------------------------------------------

    def open_update(self, version: int) -> None:
        """Take all servers out of service, restart those that failed, and pause those that can be updated.

        The first update waits for all servers, later ones for at least one. Raises UserError when they do not come,
        or are of another model.
        """
        self._version = version
        self._run(self._wait_until_fit())
        self._is_first_update = False
        self._on_updating(PAUSE)
        self._on_updating(START_UPDATE)

    def updating(self) -> list[str]:
        """Which starts of which servers take part in the update."""
        return [f"{server.url} {server.instance}" for server in self._updating]

    def num_workers(self) -> list[int]:
        """How many processes each of them loads weights in. Raises UpdateError."""

        async def ask() -> list[Json]:
            return await self._all(self._client.get(server, WORLD_SIZE) for server in self._updating)

        return [answer["world_size"] for answer in self._run(ask())]

    def join_group(self, infos: Sequence[Json], join: Callable[[], None]) -> None:
        """Have each server join a group as its `infos` say, while this process does. Raises UpdateError."""
        bodies = [{"init_info": info} for info in infos]
        self._run(self._together(JOIN_GROUP, bodies, join))

    def send(self, update: Json, meanwhile: Callable[[], None] | None = None) -> None:
        """Have the servers load one bucket. With `meanwhile`, a collective call, it takes all of them or none.

        Raises UpdateError.
        """
        body = {"update_info": update}
        if meanwhile is None:
            self._on_updating(UPDATE, body)
        else:
            self._run(self._together(UPDATE, [body] * len(self._updating), meanwhile))

    def close_update(self) -> None:
        """The servers check that nothing is missing, and are in service again. Raises UpdateError."""
        self._on_updating(FINISH_UPDATE, {"weight_version": str(self._version)})
        self._on_updating(RESET_PREFIX_CACHE)
        self._on_updating(RESUME)
        for server in self._updating:
            server.version = self._version

    async def _wait_until_fit(self) -> None:
        for server in self._servers:
            server.version = None
        deadline = time.monotonic() + self._timeout
        while True:
            fit = await asyncio.gather(*(self._is_fit(server) for server in self._servers))
            self._updating = [server for server, is_fit in zip(self._servers, fit) if is_fit]
            if all(fit) or (self._updating and not self._is_first_update):
                return
            if time.monotonic() > deadline:
                raise UserError(
                    f"rollout servers are not ready after {self._timeout:g} s: {self._failures()}; start them with "
                    "`chord-megatron serve`, and name them in rollout.vllm_servers"
                )
            late = [f"{server.url}: {server.failure}" for server, is_fit in zip(self._servers, fit) if not is_fit]
            self._work.begin(f"waiting for rollout servers ({'; '.join(late)})")
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)

    async def _is_fit(self, server: Server) -> bool:
        """Whether an update can begin. A server that failed is asked to restart, and fit once it is back."""
        try:
            status = await self._client.get(server, STATUS, timeout=_STATUS_SECONDS)
            check_identity(server.url, self._identity, status["identity"])
            server.instance = status["instance"]
            if status["state"] in ("unsynced", "ready") and server.instance != server.failed_instance:
                return True
            server.failed_instance = server.instance
            await self._client.post(server, RESTART, timeout=_STATUS_SECONDS)
            server.failure = "restarting"
        except ServerError as error:
            server.failure = str(error)
        return False

    def _on_updating(self, path: str, body: Json | None = None) -> None:
        self._run(self._each(path, body))

    async def _each(self, path: str, body: Json | None) -> None:
        """POST to all that are being updated; one that fails is out of it. Raises UpdateError where none is left."""

        async def post(server: Server) -> bool:
            try:
                await self._client.post(server, path, body)
                return True
            except ServerError as error:
                self._take_out(server, str(error))
                return False

        done = await asyncio.gather(*(post(server) for server in self._updating))
        self._updating = [server for server, is_done in zip(self._updating, done) if is_done]
        if not self._updating:
            raise self._update_error()

    async def _together(self, path: str, bodies: Sequence[Json], meanwhile: Callable[[], None]) -> None:
        """POST to all that are being updated while `meanwhile` runs; where one fails, all do. Raises UpdateError."""
        requests = [self._client.post(server, path, body) for server, body in zip(self._updating, bodies, strict=True)]
        await self._all([*requests, _in_thread(meanwhile)])

    async def _all(self, parts: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """What they return. After a failure no server is trusted: raises UpdateError."""
        try:
            async with asyncio.TaskGroup() as group:  # the first error cancels the others
                tasks = [group.create_task(part) for part in parts]
        except ExceptionGroup as errors:
            (first, *_) = errors.exceptions
            if not isinstance(first, ServerError | RuntimeError):  # RuntimeError: torch.distributed's
                raise first from errors
            for server in self._updating:
                self._take_out(server, str(first))
            raise self._update_error() from errors
        return [task.result() for task in tasks]

    def _update_error(self) -> UpdateError:
        return UpdateError(
            f"no rollout server took the weights of version {self._version}: {self._failures()}; see what they "
            "print, and start the run again: it goes on from its latest checkpoint"
        )

    def _take_out(self, server: Server, failure: str) -> None:
        if server.failed_instance != server.instance:
            _logger.warning("rollout server %s is out of service: %s", server.url, failure)
        server.version = None
        server.failure = failure
        server.failed_instance = server.instance

    def _failures(self) -> str:
        return "; ".join(f"{server.url}: {server.failure}" for server in self._servers if server.version is None)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


async def _in_thread(function: Callable[[], None]) -> None:
    """As asyncio.to_thread, in a thread that nobody waits for at the end of the process."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def settle(error: Exception | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(None)

    def run() -> None:
        error = None
        try:
            function()
        except Exception as raised:
            error = raised
        loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, daemon=True, name="weight-broadcast").start()
    await done
