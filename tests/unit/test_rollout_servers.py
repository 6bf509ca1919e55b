"""What keeps weight updates and rollout servers honest, without vLLM: manifest, files, guard, pool, consistency."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from chord_megatron.rollout.consistency import check_consistency, largest_mean_difference
from chord_megatron.rollout.servers.pool import ServerPool
from chord_megatron.rollout.servers.transfer import BroadcastTransfer, FileTransfer
from chord_megatron.rollout.serving import guard as server_guard
from chord_megatron.rollout.serving.guard import ServerGuard
from chord_megatron.rollout.updates import files
from chord_megatron.rollout.updates.agreement import GENERATE
from chord_megatron.rollout.updates.broadcast import BroadcastGroup, pack, unpack
from chord_megatron.rollout.updates.files import read_weight_file
from chord_megatron.rollout.updates.manifest import Manifest, ManifestError, checksum
from chord_megatron.system.errors import UserError
from chord_megatron.system.work import Work
from chord_megatron.weights.schema import TensorSpec

TOKEN = "correct horse battery"
EXPECTED = {"a": TensorSpec(torch.float32, (2, 3)), "b": TensorSpec(torch.bfloat16, (4,))}
WEIGHTS = [("a", torch.arange(6.0).view(2, 3)), ("b", torch.ones(4, dtype=torch.bfloat16))]


# --- pool -----------------------------------------------------------------------------------------------------------


def test_a_pool_tells_which_servers_it_waits_for():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    work = Work()  # nobody listens there any more
    pool = ServerPool([url], TOKEN, {}, timeout=0.1, max_in_flight=1, work=work)
    with pytest.raises(UserError, match=r"rollout servers are not ready after 0\.1 s"):
        pool.open_update(0)
    pool.close()
    assert work.what.startswith(f"waiting for rollout servers ({url}: ") and work.total == 0


# --- manifest -------------------------------------------------------------------------------------------------------


def test_a_complete_update_passes():
    manifest = Manifest(EXPECTED)
    checksums = {name: checksum(tensor) for name, tensor in WEIGHTS}
    passed = list(manifest.checked(WEIGHTS, checksums))
    manifest.check_complete()
    assert [name for name, _ in passed] == ["a", "b"]
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(passed, WEIGHTS))


def test_checksums_are_of_the_bytes():
    tensor = torch.arange(6.0).view(2, 3)
    assert checksum(tensor) == checksum(tensor.t().contiguous().t())  # another layout in memory
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.tensor(1.5)) == checksum(torch.tensor([1.5]))
    words = torch.arange(5000, dtype=torch.int64)
    assert checksum(words) == checksum(torch.cat([words[:1], words])[1:])  # wherever it begins in memory
    assert checksum(words.view(torch.uint8)) == checksum(
        torch.cat([torch.zeros(3, dtype=torch.uint8), words.view(torch.uint8)])[3:]
    )


@pytest.mark.parametrize("size", [1, 2048, 2049, 10_000])
def test_checksums_tell_changed_exchanged_and_missing_values_apart(size: int):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0))
    changed = [torch.cat([tensor, torch.zeros(1)]), tensor[:-1]]
    for place in {0, size // 2, size - 1}:
        bit = tensor.clone()
        bit.view(torch.int32)[place] ^= 1
        changed.append(bit)
    if size > 1:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
        changed += [tensor.roll(1), tensor.roll(2048) if size > 2048 else tensor.flip(0), tensor[order]]
    assert len({checksum(tensor), *(checksum(other) for other in changed)}) == 1 + len(changed)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([("c", torch.ones(1))], "the model has no tensor c"),
        ([WEIGHTS[0], WEIGHTS[0]], "a arrived twice"),
        ([("a", torch.ones(3, 2))], r"a is torch.float32 \[3, 2\] where the model has torch.float32 \[2, 3\]"),
        ([("b", torch.ones(4))], r"b is torch.float32 \[4\] where the model has torch.bfloat16 \[4\]"),
        ([("a", torch.zeros(2, 3))], "a arrived with other bytes than were sent"),
    ],
)
def test_what_is_wrong_is_named(weights: list[tuple[str, Tensor]], message: str):
    checksums = {name: checksum(tensor) for name, tensor in WEIGHTS}
    with pytest.raises(ManifestError, match=message):
        list(Manifest(EXPECTED).checked(weights, checksums))


def test_half_an_update_is_not_complete():
    manifest = Manifest(EXPECTED)
    list(manifest.checked(WEIGHTS[:1]))
    with pytest.raises(ManifestError, match="1 of 2 tensors did not arrive: b"):
        manifest.check_complete()


# --- files ----------------------------------------------------------------------------------------------------------


class FileReader:
    """A pool whose servers read the files that they are sent."""

    def __init__(self) -> None:
        self.arrived: list[list[tuple[str, Tensor]]] = []

    def send(self, update: dict[str, Any]) -> None:
        bucket = list(read_weight_file(Path(update["path"])))
        assert len(list(Path(update["path"]).parent.iterdir())) == 1
        assert {name: checksum(tensor) for name, tensor in bucket} == update["checksums"]
        self.arrived.append(bucket)


def test_weights_travel_in_buckets(tmp_path: Path):
    weights = [(f"w{n}", torch.full((10,), float(n))) for n in range(5)]  # 40 bytes each
    pool = FileReader()
    FileTransfer(tmp_path, bucket_bytes=80).send(pool, iter(weights))
    assert [[name for name, _ in bucket] for bucket in pool.arrived] == [["w0", "w1"], ["w2", "w3"], ["w4"]]
    assert not list(tmp_path.iterdir())
    # What was read stays, though the files are gone.
    assert all(torch.equal(tensor, dict(weights)[name]) for bucket in pool.arrived for name, tensor in bucket)


@pytest.mark.attack
def test_an_update_that_breaks_off_leaves_no_files(tmp_path: Path):
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield WEIGHTS[0]
        yield WEIGHTS[1]
        raise RuntimeError("lost a rank")

    pool = FileReader()
    with pytest.raises(RuntimeError, match="lost a rank"):
        FileTransfer(tmp_path, bucket_bytes=1).send(pool, broken())
    assert len(pool.arrived) == 1 and not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"^rollout.weight_transfer_dir: .*/file cannot be written \(.*\); name another$"
    ):
        FileTransfer(tmp_path / "file", bucket_bytes=24).send(FileReader(), iter(WEIGHTS))


@pytest.mark.attack
def test_no_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(UserError, match=r"24 bytes cannot be written to .*/chord-weights-.*No space.*; enlarge it"):
        FileTransfer(tmp_path, bucket_bytes=24).send(FileReader(), iter(WEIGHTS))
    assert not list(tmp_path.iterdir())


SENDER = """
import sys, time
from pathlib import Path
import torch
from chord_megatron.rollout.servers.transfer import FileTransfer
class Pool:
    def send(self, update):
        print(Path(update["path"]).parent, flush=True)
        time.sleep(1000)
FileTransfer(Path(sys.argv[1]), bucket_bytes=24).send(Pool(), iter([("a", torch.ones(6))]))
"""


@pytest.mark.attack
def test_files_of_a_killed_trainer_are_removed_at_the_next_start(tmp_path: Path):
    """And nothing else: what a trainer that lives has, what others have, what looks alike."""
    senders = [
        subprocess.Popen([sys.executable, "-c", SENDER, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        killed, alive = (Path(sender.stdout.readline().strip()) for sender in senders)
        senders[0].kill()
        senders[0].wait()
        assert [file.name for file in killed.iterdir()] == ["0.safetensors"]
        name = "chord-weights-" + "0" * 32
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
        for other in ("elsewhere", name[:-1], f"{name[:-1]}1/inside", f"{name[:-1]}2"):
            (tmp_path / other).mkdir(parents=True)
            (tmp_path / other / "0.safetensors").touch()
        (tmp_path / f"{name[:-1]}2" / "notes.txt").touch()
        (tmp_path / f"{name[:-1]}3").touch()
        FileTransfer(tmp_path, bucket_bytes=24)
        assert not killed.exists()
        assert [file.name for file in alive.iterdir()] == ["0.safetensors"]
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        assert left == {
            f"{alive.name}/0.safetensors",
            "elsewhere/0.safetensors",
            f"{name[:-1]}/0.safetensors",
            f"{name[:-1]}1/inside/0.safetensors",
            f"{name[:-1]}2/notes.txt",
            f"{name[:-1]}2/0.safetensors",
            f"{name[:-1]}3",
        }
        assert (tmp_path / name).is_symlink()
    finally:
        for sender in senders:
            sender.kill()
            sender.wait()


def test_files_of_another_user_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = tmp_path / ("chord-weights-" + "0" * 32)
    directory.mkdir()
    (directory / "0.safetensors").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 12345)
        FileTransfer(tmp_path, bucket_bytes=24)
    assert (directory / "0.safetensors").exists()
    FileTransfer(tmp_path, bucket_bytes=24)
    assert not directory.exists()


# --- broadcast ------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def group_of(rank: int, port: int, listener: socket.socket | None = None, timeout: float = 60.0) -> BroadcastGroup:
    return BroadcastGroup("127.0.0.1", port, rank=rank, world_size=3, device=CPU, timeout=timeout, listener=listener)


def test_a_broadcast_reaches_all_as_it_was_sent():
    bucket = {  # sizes that are no multiples of anything
        "a": torch.arange(7, dtype=torch.bfloat16),
        "b": torch.tensor([[1.0], [-0.0], [3.0]]),
        "c": torch.tensor([True, False]),
        "d": torch.tensor(5, dtype=torch.int64),
    }
    message, headers = pack(bucket, CPU)
    headers = json.loads(json.dumps(headers))  # they travel by HTTP
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with ThreadPoolExecutor(2) as threads:
        receivers = [threads.submit(lambda r=rank: list(unpack(headers, group_of(r, port)))) for rank in (1, 2)]
        group_of(0, port, listener).broadcast(message)
        for receiver in receivers:
            arrived = receiver.result()
            assert [name for name, _ in arrived] == list(bucket)
            for (name, tensor), header in zip(arrived, headers, strict=True):
                assert tensor.dtype == bucket[name].dtype and torch.equal(tensor, bucket[name])
                assert checksum(tensor) == header["checksum"]


@pytest.mark.attack
def test_a_receiver_that_is_gone_is_noticed():
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(group_of, rank, port, timeout=2.0) for rank in (1, 2)]
        group = group_of(0, port, listener, timeout=2.0)
        for other in others:
            other.result()  # and never receives
        with pytest.raises(RuntimeError, match=r"[Tt]imed out|closed"):
            group.broadcast(torch.zeros(50 * 10**6, dtype=torch.uint8))
        group.abort()


def test_an_address_of_another_machine_is_refused():
    transfer = BroadcastTransfer("192.0.2.1", device=CPU, bucket_bytes=80, timeout=1.0)  # of RFC 5737, nobody's
    with pytest.raises(UserError, match=r"rollout.weight_transfer_address: rank 0 cannot listen on 192.0.2.1 \("):
        transfer.send(NoServers(), iter(WEIGHTS))


class NoServers:
    def updating(self) -> list[str]:
        return []


# --- guard ----------------------------------------------------------------------------------------------------------


class Engine:
    """An application as vLLM's: answers 200, unless told otherwise; remembers what reached it."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.status = 200

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.reached.append(scope["path"])
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def ask(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ask("POST", "/path") -> status code; the token is right unless given."""
    monkeypatch.setenv(server_guard.TOKEN_VARIABLE, TOKEN)
    transport = httpx.ASGITransport(ServerGuard(engine))

    def send(method: str, path: str, *authorizations: str | None) -> int:
        given = authorizations or (f"Bearer {TOKEN}",)

        async def request() -> int:
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                headers = [("Authorization", authorization) for authorization in given if authorization]
                return (await client.request(method, path, headers=headers)).status_code

        return asyncio.run(request())

    return send


@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN} "])
@pytest.mark.parametrize(
    "path", ["/chord/status", "/chord/restart", "/health", GENERATE, "/pause", "/collective_rpc", "/"]
)
@pytest.mark.attack
def test_every_route_wants_the_token(
    ask: Any, engine: Engine, path: str, authorization: str | None, measure: Callable[[str, int], None]
):
    for method in ("GET", "POST", "OPTIONS"):
        assert ask(method, path, authorization) == 401
        measure("requests without a token, all refused", 1)
    assert engine.reached == []


@pytest.mark.parametrize("tokens", [[TOKEN, "wrong"], ["wrong", TOKEN], [TOKEN, TOKEN]])
@pytest.mark.attack
def test_two_tokens_are_none(ask: Any, engine: Engine, tokens: list[str], measure: Callable[[str, int], None]):
    """A proxy in between may have looked at the other one."""
    assert ask("GET", "/chord/status", *(f"Bearer {token}" for token in tokens)) == 401
    measure("requests without a token, all refused", 1)
    assert engine.reached == []


@pytest.mark.attack
def test_routes_that_nobody_needs_are_closed(ask: Any, engine: Engine):
    for path in ("/collective_rpc", "/v1/completions", "/sleep", "/server_info", "/health", "/inference/v1/generate/"):
        assert ask("POST", path) == 404
    assert engine.reached == []


@pytest.mark.attack
def test_no_token_is_sampled_before_a_complete_update(ask: Any, engine: Engine):
    assert ask("POST", GENERATE) == 409
    for path in ("/start_weight_update", "/update_weights"):
        assert ask("POST", path) == 200
        assert ask("POST", GENERATE) == 409
    assert ask("POST", "/finish_weight_update") == 200
    assert ask("POST", GENERATE) == 200
    assert ask("POST", "/start_weight_update") == 200
    assert ask("POST", GENERATE) == 409
    assert engine.reached.count(GENERATE) == 1


@pytest.mark.attack
def test_a_failed_update_is_not_healed_by_a_finish(ask: Any, engine: Engine):
    ask("POST", "/start_weight_update")
    engine.status = 500
    assert ask("POST", "/update_weights") == 500
    engine.status = 200
    assert ask("POST", "/finish_weight_update") == 409
    assert ask("POST", GENERATE) == 409
    assert ask("POST", "/start_weight_update") == 409  # only a restart helps


def test_health_is_the_engines(ask: Any, engine: Engine):
    assert ask("GET", "/chord/health") == 200
    engine.status = 503
    assert ask("GET", "/chord/health") == 503
    assert engine.reached == ["/health", "/health"]


@pytest.mark.parametrize("token", ["", "short", "x" * 15, "gr\u00fc\u00dfe an alle hier!!", "two lines\nof the secret"])
@pytest.mark.attack
def test_a_poor_secret_is_refused(monkeypatch: pytest.MonkeyPatch, token: str):
    monkeypatch.setenv(server_guard.TOKEN_VARIABLE, token)
    with pytest.raises(UserError, match="at least 16 printable ASCII characters"):
        server_guard.read_token()


# --- consistency ----------------------------------------------------------------------------------------------------


def test_the_engine_that_differs_most_is_named():
    expected = [[-1.0, -2.0], [-3.0]]
    scores = {"near": [[-1.0, -2.1], [-3.0]], "far": [[-1.5, -2.0], [-2.9]]}
    difference, name = largest_mean_difference(expected, scores)
    assert difference == pytest.approx(0.2) and name == "far"
    assert largest_mean_difference(expected, {}) == (0.0, "")
    scores["broken"] = [[-1.0, math.nan], [-3.0]]
    assert largest_mean_difference(expected, scores) == (math.inf, "broken")


@pytest.mark.parametrize("difference", [0.0500001, math.inf])
def test_a_difference_above_the_threshold_stops_or_warns(difference: float):
    check_consistency(0.05, "engine", threshold=0.05, version=3, action="stop")
    with pytest.raises(UserError, match=r"engine and the trainer disagree about weights of version 3.*differ by"):
        check_consistency(difference, "engine", threshold=0.05, version=3, action="stop")
    with pytest.warns(UserWarning, match="differ by"):
        check_consistency(difference, "engine", threshold=0.05, version=3, action="warn")
