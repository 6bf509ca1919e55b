"""Two real vLLM servers, their weight updates, and what happens when they are killed, frozen or fed damaged updates."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from harness import (
    TIMEOUT_SECONDS,
    free_ports,
    kill,
    read_lines,
    read_metrics,
    start,
    succeeded,
    train_here,
    train_on_forks,
    weights,
    write_config,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from chord_megatron.batching.packing import BatchLayout
from chord_megatron.config import RolloutConfig
from chord_megatron.rollout.servers.pool import ServerPool
from chord_megatron.rollout.servers.rollout import ServerRollout
from chord_megatron.rollout.servers.transfer import BroadcastTransfer, FileTransfer, WeightTransfer
from chord_megatron.rollout.serving.serve import identity
from chord_megatron.rollout.vllm_adapter import SCORING_ARGUMENTS, sampling_arguments
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.timers import PhaseTimer
from chord_megatron.training.sampler import Sampler
from chord_megatron.types import GlobalBatch, Prompt, RolloutSample, SamplingParams

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm"),
]

TOKEN = "a secret for these tests alone"
READY_SECONDS = 480
Weights = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("CHORD_SERVER_TOKEN", TOKEN)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def servers(
    vllm_assets: Path, token: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Popen[str]]]:
    """URL -> process of two servers, which start while the first test waits for them.

    Where the tests that restart them run too, as users start them; else without compiling the model, half the work.
    """
    started = {}
    of_module = [item for item in request.session.items if item.path == request.path]
    is_long = any(item.get_closest_marker("slow") for item in of_module)
    for port in free_ports(2):
        options = ["--port", str(port), "--dtype", "float32", "--max-model-len", "64"]
        options += [] if is_long else ["--", "--enforce-eager"]
        process = start(
            "chord_megatron.cli", "serve", vllm_assets / "model", *options, log=tmp_path_factory.mktemp("log")
        )
        started[f"http://127.0.0.1:{port}"] = process
    yield started
    for process in started.values():
        process.terminate()
        with suppress(Exception):
            process.wait(timeout=30)
        kill_if_alive(process)


@pytest.fixture(scope="module")
def exported(vllm_assets: Path) -> Weights:
    return load_file(vllm_assets / "model" / "model.safetensors")


@pytest.fixture
def open_pool(servers: dict, vllm_assets: Path) -> Iterator[Callable[..., ServerPool]]:
    pools = []

    def build(urls: list[str] | None = None, **options: Any) -> ServerPool:
        model = identity(vllm_assets / "model", "float32")
        arguments = {"timeout": READY_SECONDS, "max_in_flight": 8, "token": TOKEN, "identity": model} | options
        pools.append(ServerPool(urls or list(servers), **arguments))
        return pools[-1]

    yield build
    for pool in pools:
        pool.close()


@pytest.fixture
def single_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def update(pool: ServerPool, tensors: Weights, version: int, directory: Path) -> None:
    send(pool, FileTransfer(directory, bucket_bytes=20_000), tensors, version)


def send(pool: ServerPool, transfer: WeightTransfer, tensors: Weights, version: int) -> None:
    pool.open_update(version)
    transfer.send(pool, tensors.items())
    pool.close_update()


def broadcast() -> BroadcastTransfer:
    return BroadcastTransfer("127.0.0.1", device=torch.device("cpu"), bucket_bytes=20_000, timeout=READY_SECONDS)


def requests(count: int, length: int = 8) -> list[dict[str, Any]]:
    params = SamplingParams(max_completion_length=length)
    return [{"token_ids": [5, 6, 7], "sampling_params": sampling_arguments(params, (0, 0, i))} for i in range(count)]


def tokens(choices: list[dict[str, Any]]) -> list[list[int]]:
    return [choice["token_ids"] for choice in choices]


def in_service(pool: ServerPool) -> set[str]:
    return {server.url for server in pool._servers if server.version is not None}


def test_a_run_learns_from_a_server_as_from_the_embedded_engine(servers: dict, vllm_assets: Path, tmp_path: Path):
    """TP 2 trainer; synchronous, then one step ahead. Samples differ between engines, what is computed does not."""
    config = write_config(vllm_assets, tmp_path)
    options = ("rollout.engine=vllm", "rollout.vllm_mode=server", f"rollout.vllm_servers={list(servers)}")
    recorded = tmp_path / "rollouts.jsonl"
    outcome = succeeded(
        train_on_forks(config, *options, "parallel.tensor_model_parallel_size=2", f"rollout.record_to={recorded}")
    )
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 6
    for line in lines:
        assert line["log_prob_diff_mean"] <= 1e-4 and line["log_prob_diff_max"] <= 1e-2
    assert [line["policy_version"] for line in read_lines(recorded)] == [step for step in range(6) for _ in range(8)]
    assert TOKEN not in outcome.stdout + outcome.stderr
    assert not any(TOKEN in path.read_text(errors="replace") for path in (tmp_path / "run").glob("*.*"))

    ahead = tmp_path / "ahead.jsonl"
    succeeded(
        train_here(
            config,
            *options,
            f"train.output_dir={tmp_path / 'ahead'}",
            f"rollout.record_to={ahead}",
            "rollout.max_staleness=1",
            "rollout.weight_transfer=broadcast",
            "train.eval_steps=2",
            f"data.eval_dataset={vllm_assets / 'prompts.jsonl'}",
            "data.num_eval_prompts=2",
        )
    )
    versions = [line["policy_version"] for line in read_lines(ahead)]
    assert versions == [max(0, step - 1) for step in range(6) for _ in range(8)]
    assert all(line["log_prob_diff_max"] > 1e-3 for line in read_metrics(tmp_path / "ahead")[2:] if "loss" in line)

    # The recorded rollouts, trained on by the embedded engine's trainer, give the same losses and weights.
    succeeded(
        train_here(
            config,
            f"train.output_dir={tmp_path / 'replayed'}",
            "rollout.engine=replay",
            f"rollout.replay_from={recorded}",
        )
    )
    for ours, theirs in zip(lines, read_metrics(tmp_path / "replayed"), strict=True):
        assert ours["reward_mean"] == theirs["reward_mean"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    replayed = weights(tmp_path / "replayed", 6)
    for name, tensor in weights(tmp_path / "run", 6).items():
        torch.testing.assert_close(tensor, replayed[name], rtol=0, atol=5e-4)


def test_all_servers_hold_what_was_sent_and_count_its_version(
    open_pool: Callable[..., ServerPool], exported: Weights, vllm_assets: Path, tmp_path: Path
):
    """By files and by broadcast."""
    pool, transfer = open_pool(), broadcast()
    changed = {name: tensor + 0.01 for name, tensor in exported.items()}
    update(pool, changed, 1, tmp_path)
    after_one = tokens(pool.submit(requests(8), 1).result())
    send(pool, transfer, exported, 2)
    group = transfer._group  # serves the next update as well
    after_two = pool.submit(requests(8), 2).result()
    send(pool, transfer, changed, 3)
    assert transfer._group is group is not None
    assert tokens(pool.submit(requests(8), 3).result()) == after_one != tokens(after_two)
    assert {span["version"] for choice in after_two for span in choice["weight_versions"]} == {"2"}
    with pytest.raises(UserError, match="no rollout server is left"):
        pool.submit(requests(1), 2).result()
    scores = pool.score([[5, 6, 7], [8, 9]], SCORING_ARGUMENTS)
    assert len(scores) == 2  # one of each server, and the same
    first, second = scores.values()
    assert first == second and [len(row) for row in first] == [2, 1]


@pytest.mark.slow
def test_a_server_completes_as_an_engine_that_reads_the_checkpoint_itself(
    open_pool: Callable[..., ServerPool], exported: Weights, vllm_assets: Path, tmp_path: Path
):
    pool = open_pool()
    update(pool, exported, 1, tmp_path)
    fresh = tmp_path / "fresh.json"
    worker = Path(__file__).with_name("vllm_colocate_worker.py")
    describe = [sys.executable, worker, fresh, "--fresh", vllm_assets / "model"]
    subprocess.run(describe, check=True, timeout=TIMEOUT_SECONDS)
    expected = json.loads(fresh.read_text(encoding="utf-8"))["tokens"]
    assert tokens(pool.submit(requests(4, 12), 1).result()) == expected


class Trainer:
    """The trainer's side of the sampler: transformers computes the log-probs, the tensors are what is given."""

    batch_layout = BatchLayout()

    def __init__(self, model_dir: Path, exported: Weights, policy_version: int) -> None:
        self.policy_version = policy_version
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self._exported = exported

    def compute_log_probs(self, batch: GlobalBatch) -> list[Tensor]:
        rows = []
        (micro_batch,) = batch.micro_batches
        for tokens in micro_batch.input_ids.split(batch.lengths):
            with torch.no_grad():
                log_probs = self._model(tokens[None]).logits[0].log_softmax(-1)
            rows.append(torch.cat([torch.zeros(1), log_probs[:-1].gather(1, tokens[1:, None])[:, 0]]))
        return rows

    def export_hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._exported.items())

    def offloaded(self, **_: bool) -> Any:
        return nullcontext()


@pytest.mark.attack
def test_a_sampler_with_other_weights_than_the_trainers_stops_the_run(
    open_pool: Callable[..., ServerPool], exported: Weights, vllm_assets: Path, single_process: None, tmp_path: Path
):
    """A complete update with right checksums, of weights that are not the policy's: only the probes can tell."""
    prompts = [Prompt(n, "", (5, 6 + n, 7, 8), "") for n in range(4)]
    rollout = ServerRollout(open_pool(), FileTransfer(tmp_path, bucket_bytes=20_000), torch.device("cpu"), seed=0)

    def draw(sent: Weights, version: int) -> list[RolloutSample]:
        trainer = Trainer(vllm_assets / "model", sent, version)
        sampler = Sampler(trainer, rollout, RolloutConfig(consistency_threshold=1e-4), prompts, PhaseTimer())
        params = SamplingParams(max_completion_length=4)
        return sampler.draw(prompts, params, num_generations=1, step=0).result()

    assert len(draw(exported, 1)) == 4
    swapped = exported | {
        name: exported[name.replace("layers.0", "layers.1")] for name in exported if "layers.0" in name
    }
    with pytest.raises(UserError, match=r"http.* and the trainer disagree about weights of version 2: log-probs of"):
        draw(swapped, 2)


@pytest.mark.slow
@pytest.mark.attack
def test_damaged_and_broken_updates_never_sample(
    open_pool: Callable[..., ServerPool], servers: dict, exported: Weights, tmp_path: Path
):
    """One server gets a tensor of a wrong shape, the other half an update. Both come back after a restart."""
    first, second = servers
    name = next(iter(exported))
    one, other = open_pool([first]), open_pool([second])
    with pytest.raises(UserError, match=f"{name} is torch.float32 .* where the model has"):
        update(one, exported | {name: exported[name][:-1]}, 1, tmp_path)
    with pytest.raises(UserError, match="tensors did not arrive"):
        update(other, {name: exported[name]}, 1, tmp_path)
    for pool in (one, other):
        with pytest.raises(UserError, match="no rollout server is left"):
            pool.submit(requests(1), 1).result()

    pool = open_pool()
    update(pool, exported, 1, tmp_path)  # waits for both to restart
    assert in_service(pool) == set(servers)
    assert len(tokens(pool.submit(requests(4), 1).result())) == 4


@pytest.mark.slow
@pytest.mark.attack
def test_a_killed_and_a_frozen_server_lose_no_completion(
    open_pool: Callable[..., ServerPool], servers: dict[str, Popen[str]], exported: Weights, tmp_path: Path
):
    pool = open_pool()
    update(pool, exported, 1, tmp_path)
    expected = tokens(pool.submit(requests(24, 48), 1).result())

    victim, survivor = servers
    drawing = pool.submit(requests(24, 48), 1)
    kill_children(servers[victim])
    assert tokens(drawing.result()) == expected
    # It may have answered in time; a request shows that it is gone.
    assert tokens(pool.submit(requests(24, 48), 1).result()) == expected
    assert in_service(pool) == {survivor}
    wait_for(lambda: in_service_after_update(pool, exported, 2, tmp_path) == set(servers))

    pool = open_pool(timeout=5.0)
    wait_for(lambda: in_service_after_update(pool, exported, 3, tmp_path) == set(servers))
    frozen = psutil.Process(servers[survivor].pid).children(recursive=True)
    drawing = pool.submit(requests(24, 48), 3)
    for child in frozen:
        child.suspend()
    assert tokens(drawing.result()) == expected
    assert tokens(pool.submit(requests(24, 48), 3).result()) == expected
    assert in_service(pool) == {victim}
    for child in frozen:
        child.resume()
    assert in_service_after_update(pool, exported, 4, tmp_path) == {victim}  # the other has to restart first
    wait_for(lambda: in_service_after_update(pool, exported, 5, tmp_path) == set(servers))


@pytest.mark.slow
@pytest.mark.attack
def test_a_server_killed_amid_a_broadcast_makes_it_start_again(
    open_pool: Callable[..., ServerPool],
    servers: dict[str, Popen[str]],
    exported: Weights,
    single_process: None,
    tmp_path: Path,
):
    """The survivor has half an update then: it may not sample from it, and is restarted as well."""
    pool, victim = open_pool(), next(iter(servers))
    update(pool, exported, 1, tmp_path)
    expected = tokens(pool.submit(requests(8), 1).result())
    passes = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        passes.append(len(passes))
        for number, item in enumerate(exported.items()):
            if number == 3 and len(passes) == 1:
                kill_children(servers[victim])
            yield item

    rollout = ServerRollout(pool, broadcast(), torch.device("cpu"), seed=0)
    rollout.update_weights(weights, 2)
    assert passes == [0, 1] and rollout.weights_version == 2
    assert tokens(pool.submit(requests(8), 2).result()) == expected


@pytest.mark.attack
def test_wrong_tokens_and_models_are_refused(
    open_pool: Callable[..., ServerPool], vllm_assets: Path, assets: Path, exported: Weights, tmp_path: Path
):
    with pytest.raises(UserError, match="refuses the token; set the CHORD_SERVER_TOKEN"):
        open_pool(token="another secret, as long").open_update(1)
    other = identity(assets / "model", "float32")
    with pytest.raises(UserError, match="serves another model: its head_dim is 32, the trainer's 8"):
        open_pool(identity=other).open_update(1)
    with pytest.raises(UserError, match="its dtype is float32, the trainer's bfloat16"):
        open_pool(identity=identity(vllm_assets / "model", "bfloat16")).open_update(1)
    with pytest.raises(UserError, match="its tokenizer_sha256 is"):
        open_pool(identity=replace_vocabulary(vllm_assets)).open_update(1)


def test_without_a_server_the_run_says_so(vllm_assets: Path, tmp_path: Path):
    (port,) = free_ports(1)
    config = write_config(vllm_assets, tmp_path)
    options = ("rollout.engine=vllm", "rollout.vllm_mode=server", "rollout.vllm_server_timeout=1")
    outcome = train_on_forks(config, *options, f"rollout.vllm_servers=['http://127.0.0.1:{port}']")
    assert outcome.code == 2
    (error,) = outcome.errors
    assert "Traceback" not in outcome.stderr  # of the other rank
    assert "rollout servers are not ready after 1 s" in error and "start them with `chord-megatron serve`" in error


def in_service_after_update(pool: ServerPool, tensors: Weights, version: int, directory: Path) -> set[str]:
    update(pool, tensors, version, directory)
    return in_service(pool)


def replace_vocabulary(vllm_assets: Path) -> dict[str, Any]:
    return identity(vllm_assets / "model", "float32") | {"tokenizer_sha256": "0" * 64}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "a server did not come back"
        time.sleep(1)


def kill_children(process: Popen[str]) -> None:
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()


def kill_if_alive(process: Popen[str]) -> None:
    if process.poll() is None:
        kill(process)
