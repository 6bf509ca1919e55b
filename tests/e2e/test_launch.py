"""Two nodes, each an agent of torchrun, by the scripts of examples/launch; agents are killed and come back."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from harness import (
    finish,
    kill,
    read_lines,
    read_metrics,
    succeeded,
    wait_until,
    weight_bytes,
    write_config,
)

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

LAUNCH = Path(__file__).resolve().parents[2] / "examples" / "launch"
OVERRIDES = ("parallel.tensor_model_parallel_size=2", "train.train_iters=8")  # a checkpoint every second step
Agent = subprocess.Popen[str]


def start_agent(script: str, node_rank: int, port: int, config: Path, **environment: str) -> Agent:
    """One node of two, with one process, in a process group of its own."""
    return subprocess.Popen(
        [LAUNCH / script, config, *OVERRIDES],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "NNODES": "2",
            "NODE_RANK": str(node_rank),
            "NPROC_PER_NODE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RDZV_ENDPOINT": f"127.0.0.1:{port}",
            "LOCAL_ADDR": "127.0.0.1",
            **environment,
        },
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def logged_steps(run: Path) -> list[int]:
    metrics = run / "metrics.jsonl"
    return [line["step"] for line in read_lines(metrics)] if metrics.exists() else []


def latest(run: Path) -> str:
    return (run / "checkpoints" / "latest").read_text().strip()


def workers_of(agent: Agent) -> list[tuple[str, ...]]:
    """Node, rank, processes on the node and in all, of each training process that the agent started."""
    found = [child.environ() for child in psutil.Process(agent.pid).children()]
    return [tuple(env[name] for name in ("GROUP_RANK", "RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")) for env in found]


@pytest.fixture(scope="module")
def undisturbed(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run by two static agents."""
    root = tmp_path_factory.mktemp("static")
    config, port = write_config(assets, root), free_port()
    agents = [start_agent("static_nodes.sh", rank, port, config) for rank in (0, 1)]
    wait_until(lambda: logged_steps(root / "run") != [], agents[0])
    assert [workers_of(agent) for agent in agents] == [[("0", "0", "1", "2")], [("1", "1", "1", "2")]]
    for agent in agents:
        succeeded(finish(agent))
    return root / "run"


def test_two_static_agents_train(undisturbed: Path):
    assert logged_steps(undisturbed) == list(range(8))
    assert latest(undisturbed) == "step_8"


def test_killed_agents_come_back_and_the_run_is_the_undisturbed_one(undisturbed: Path, assets: Path, tmp_path: Path):
    """First the agent that only takes part dies, later the one that keeps the rendezvous."""
    config, port, run = write_config(assets, tmp_path), free_port(), tmp_path / "run"

    def start(node_rank: int, **environment: str) -> Agent:
        return start_agent("elastic_nodes.sh", node_rank, port, config, **environment)

    # A reward function that waits is where an agent dies: node 1 in step 3, and node 0 in step 7, its sixth step after
    # the others' restart at step 2.
    keeper, member = start(0, HOLD_AT_CALL="6"), start(1, HOLD_AT_CALL="4")
    wait_until(lambda: logged_steps(run) == [0, 1, 2], keeper)
    assert latest(run) == "step_2"
    assert kill(member) == [], "the workers outlived their agent"
    finish(member)
    member = start(1)

    wait_until(lambda: logged_steps(run) == [0, 1, 2, 3, 4, 5, 6], keeper)
    assert latest(run) == "step_6"
    assert kill(keeper) == [], "the workers outlived their agent"
    first_keeper = finish(keeper)
    keeper = start(0)

    outcomes = [succeeded(finish(agent)) for agent in (keeper, member)]
    printed = "".join(outcome.stdout for outcome in (first_keeper, *outcomes))
    assert sorted(re.findall(rf"resuming {run} at step (\d+)", printed)) == ["2", "6"]
    # A lost member costs no attempt; with the keeper the rendezvous is lost, and torchrun has to be started again.
    assert "torchrun ended" not in first_keeper.stderr
    assert outcomes[1].stderr.count("torchrun ended with 1 (attempt 1 of 3)") == 1
    assert logged_steps(run) == list(range(8))
    assert read_metrics(run) == read_metrics(undisturbed)
    assert weight_bytes(run, 8) == weight_bytes(undisturbed, 8)
