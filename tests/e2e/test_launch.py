"""The quickstart on two nodes, each an agent of torchrun, by the scripts of examples/launch; agents are killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from harness import (
    finish,
    free_ports,
    kill,
    read_lines,
    read_metrics,
    succeeded,
    wait_until,
    weight_bytes,
)

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Agent = subprocess.Popen[str]
_started: list[Agent] = []


@pytest.fixture(scope="module", autouse=True)
def no_agent_left_behind() -> Iterator[None]:
    """A failed test leaves agents that wait for one another."""
    yield
    for agent in _started:
        if agent.poll() is None:
            kill(agent)


@pytest.fixture(scope="module")
def overrides(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The quickstart's files, 8 steps of it, and a reward function that also differs between random completions."""
    root = tmp_path_factory.mktemp("quickstart")
    make = [sys.executable, EXAMPLES / "quickstart" / "make_quickstart.py", "--output-dir", root]
    subprocess.run(make, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    return (
        f"model.path={root / 'model'}",
        f"data.dataset={root / 'prompts.jsonl'}",
        "data.eval_dataset=null",  # evaluations call the reward functions too
        "train.eval_steps=null",
        f"chord.chord_sft_dataset={root / 'experts.jsonl'}",
        f"rewards.reward_funcs=[accuracy,{assets / 'rewards.py'}:letters]",
        "rewards.environment=[HOLD_AT_CALL]",
        "train.train_iters=8",
        "optimizer.lr_warmup_iters=2",
        "train.save_steps=2",
        "tracking.report_to=[]",
    )


def start_agent(script: str, node_rank: int, port: int, overrides: Sequence[str], **environment: str) -> Agent:
    """One node of two, with one process, in a process group of its own."""
    agent = subprocess.Popen(
        [EXAMPLES / "launch" / script, EXAMPLES / "quickstart" / "quickstart.yaml", *overrides],
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
    _started.append(agent)
    return agent


def logged_steps(run: Path) -> list[int]:
    metrics = run / "metrics.jsonl"
    return [line["step"] for line in read_lines(metrics)] if metrics.exists() else []


def latest(run: Path) -> str:
    return (run / "checkpoints" / "latest").read_text().strip()


def workers_of(agent: Agent) -> list[tuple[str, ...]]:
    """Node, rank, processes on the node and in all, of each training process that the agent started."""
    found = [child.environ() for child in psutil.Process(agent.pid).children()]
    return [tuple(env[name] for name in ("GROUP_RANK", "RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")) for env in found]


def where_it_listens(agent: Agent, port: int) -> set[str]:
    """Addresses at which an agent's descendants have that port."""
    sockets = [c for child in psutil.Process(agent.pid).children(recursive=True) for c in child.net_connections("inet")]
    return {c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


@pytest.fixture(scope="module")
def undisturbed(overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run by two static agents."""
    (port,), run = free_ports(1), tmp_path_factory.mktemp("static") / "run"
    all_overrides = [*overrides, f"train.output_dir={run}"]
    agents = [start_agent("static_nodes.sh", rank, port, all_overrides) for rank in (0, 1)]
    wait_until(lambda: logged_steps(run) != [], agents[0])
    assert [workers_of(agent) for agent in agents] == [[("0", "0", "1", "2")], [("1", "1", "1", "2")]]
    assert where_it_listens(agents[0], port) == {"127.0.0.1"}, "MASTER_ADDR, and nowhere else"
    for agent in agents:
        succeeded(finish(agent))
    return run


def test_two_static_agents_train(undisturbed: Path):
    assert logged_steps(undisturbed) == list(range(8))
    assert latest(undisturbed) == "step_8"


@pytest.mark.attack
@pytest.mark.slow
def test_killed_agents_come_back_and_the_run_is_the_undisturbed_one(
    undisturbed: Path, overrides: tuple[str, ...], tmp_path: Path
):
    """First the agent that only takes part dies, later the one that keeps the rendezvous."""
    (port,), run = free_ports(1), tmp_path / "run"

    def start(node_rank: int, **environment: str) -> Agent:
        all_overrides = [*overrides, f"train.output_dir={run}"]
        return start_agent("elastic_nodes.sh", node_rank, port, all_overrides, **environment)

    # A reward function that waits is where an agent dies: node 1 in step 3, and node 0 in step 7, its sixth step after
    # the others' restart at step 2.
    keeper, member = start(0, HOLD_AT_CALL="6"), start(1, HOLD_AT_CALL="4")
    wait_until(lambda: logged_steps(run) == [0, 1, 2], keeper)
    assert latest(run) == "step_2"
    assert where_it_listens(keeper, port) == {"127.0.0.1"}, "RDZV_ENDPOINT, and nowhere else"
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
