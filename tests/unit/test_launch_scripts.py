"""The launch scripts of examples/launch, with stand-ins for torchrun, Slurm's commands and docker."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "examples" / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in {".sh", ".sbatch"})
SHELL_FILES = sorted(
    path
    for folder in (".ci", "benchmarks", "examples", "tests", "tools")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and re.match(rb"#!.*\b(ba)?sh\b", path.read_bytes()[:64])
)
MANIFESTS = sorted((LAUNCH / "kubernetes").glob("*.yaml"))
ENVIRONMENT = {"NODE_RANK": "1", "MASTER_ADDR": "node0", "RDZV_ENDPOINT": "node0:29500", "NPROC_PER_NODE": "4"}
SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_NODELIST": "a[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
}


class StandIns:
    """Commands that note their arguments in a file, in front of the real ones on PATH."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "calls"
        self.log.touch()

    def add(self, name: str, body: str = "") -> None:
        """`body` is what the command does after it has noted its arguments."""
        path = self.directory / name
        path.write_text(f'#!/usr/bin/env bash\nset -euo pipefail\necho "{name} $*" >> "{self.log}"\n{body}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        """The arguments of each call of that command."""
        lines = [line.partition(" ") for line in self.log.read_text().splitlines()]
        return [arguments for command, _, arguments in lines if command == name]

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start one of the launch scripts."""
        path = f"{self.directory}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            [LAUNCH / script, *arguments],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, **environment, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell cannot trap what is ignored where it starts, as SIGINT is in background jobs.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str]:
        """Its exit code and what it wrote to stderr."""
        process = self.start(script, *arguments, **environment)
        stderr = process.communicate(timeout=60)[1]
        return process.returncode, stderr


@pytest.fixture
def stand_ins(tmp_path: Path) -> StandIns:
    commands = StandIns(tmp_path)
    for name in ("chord-megatron", "docker", "scontrol", "sleep", "srun", "torchrun"):
        commands.add(name)
    return commands


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# The rules of every script


@pytest.mark.parametrize("path", SHELL_FILES, ids=name_of)
def test_shellcheck_finds_nothing(path: Path):
    beside_python = Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{beside_python}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing; pip install --editable '.[dev]'"
    result = subprocess.run([shellcheck, "--shell=bash", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", SHELL_FILES, ids=name_of)
def test_scripts_stop_at_the_first_error(path: Path):
    commands = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert commands[0] == "set -euo pipefail"
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", [*SCRIPTS, *MANIFESTS], ids=name_of)
def test_nothing_is_ended_by_name_and_no_secret_is_written_down(path: Path):
    text = path.read_text()
    assert not re.search(r"\b(pkill|killall)\b", text)
    # A name that is followed by its value: NAME=value, or a manifest's env entry.
    assert not re.search(r"(?i)(token|secret|password|api_key)\w*=[^\s./]", text)
    assert not re.search(r"(?i)name: \w*(token|password|api_key)\w*\n\s*value:", text)


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_every_setting_is_a_variable_at_the_top(path: Path):
    settings, _, rest = path.read_text().partition("\nshift\n")
    assert re.search(r"^CONFIG=", settings, re.MULTILINE)
    assert not re.search(r"^\w+=\$\{\w+:[-?]", rest, re.MULTILINE)


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_without_a_recipe_a_script_says_how_to_call_it(path: Path, stand_ins: StandIns):
    code, stderr = stand_ins.run(path.name, **SLURM)
    assert code != 0
    assert "CONFIG.yaml [key=value ...]" in stderr
    assert stand_ins.log.read_text() == ""


@pytest.mark.parametrize("path", [*SCRIPTS, *MANIFESTS, LAUNCH / "README.md"], ids=name_of)
def test_files_that_are_named_exist(path: Path):
    for name in re.findall(r"\bexamples/[\w./-]*\w", path.read_text()):
        assert (ROOT / name).exists(), name


# What they run


def test_one_node(stand_ins: StandIns):
    assert stand_ins.run("single_node.sh", "c.yaml", "optimizer.lr=1e-6") == (0, "")
    assert stand_ins.calls("chord-megatron") == ["train c.yaml --nproc-per-node 4 optimizer.lr=1e-6"]


def test_static_nodes(stand_ins: StandIns):
    assert stand_ins.run("static_nodes.sh", "c.yaml", "a.b=1", NNODES="3") == (0, "")
    assert stand_ins.calls("chord-megatron") == [
        "train c.yaml --nnodes 3 --node-rank 1 --master-addr node0 --master-port 29500 --nproc-per-node 4 a.b=1"
    ]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_elastic_nodes(stand_ins: StandIns, rank: str):
    """On node 0 another program is torchrun, and keeps the store."""
    command, first = ("python", f"{LAUNCH}/elastic_agent.py node0:29500 ") if rank == "0" else ("torchrun", "")
    noted = "store $TORCH_DISABLE_SHARE_RDZV_TCP_STORE $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    stand_ins.add(command, f'echo "{noted}" >> {stand_ins.log}')
    assert stand_ins.run("elastic_nodes.sh", "c.yaml", "a.b=1", NODE_RANK=rank, LOCAL_ADDR="10.0.0.7") == (0, "")
    assert stand_ins.calls("chord-megatron") == ["validate c.yaml --nnodes 2 --nproc-per-node 4 a.b=1"]
    assert stand_ins.calls(command) == [
        f"{first}--nnodes 2 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint node0:29500"
        " --rdzv-id chord --rdzv-conf is_host=false,join_timeout=600,read_timeout=600 --local-addr 10.0.0.7"
        " -m chord_megatron.train c.yaml a.b=1"
    ]
    assert stand_ins.calls("store") == ["1 30"]


WORKER = """
import os, psutil
sockets = psutil.Process(os.getppid()).net_connections("inet")
print("listens at", sorted({c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN}))
"""


def test_the_agent_of_node_0_listens_at_the_endpoint_alone(tmp_path: Path):
    (tmp_path / "worker.py").write_text(WORKER)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    endpoint = f"127.0.0.1:{port}"
    options = ("--nnodes", "1", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint)
    command = [sys.executable, LAUNCH / "elastic_agent.py", endpoint, *options, "--rdzv-conf", "is_host=false"]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        [*command, tmp_path / "worker.py"], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stdout) == (0, "listens at ['127.0.0.1']\n"), done.stderr


def test_an_endpoint_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, LAUNCH / "elastic_agent.py", endpoint]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    port = endpoint.split(":")[1]
    assert (done.returncode, done.stderr) == (
        2,
        f"error: port {port} of 127.0.0.1 is taken, by another run? choose another\n",
    )


@pytest.mark.parametrize("script", ["static_nodes.sh", "elastic_nodes.sh"])
def test_a_network_device_is_gloo_s_and_nccl_s(stand_ins: StandIns, script: str):
    for command in ("chord-megatron", "torchrun"):
        stand_ins.add(command, f'echo "device $GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME" >> {stand_ins.log}')
    assert stand_ins.run(script, "c.yaml", SOCKET_IFNAME="ib0")[0] == 0
    assert set(stand_ins.calls("device")) == {"ib0 ib0"}


def test_elastic_nodes_say_for_whom_they_wait(stand_ins: StandIns):
    process = stand_ins.start("elastic_nodes.sh", "c.yaml", JOIN_TIMEOUT="900")
    assert "node 1 of 2 meets the others at node0:29500, for whom it waits 900 s" in process.communicate(timeout=60)[0]


def test_torchrun_is_started_again_but_not_for_ever(stand_ins: StandIns):
    stand_ins.add("torchrun", "exit 9")
    code, stderr = stand_ins.run("elastic_nodes.sh", "c.yaml", ATTEMPTS="2")
    assert code == 9
    assert len(stand_ins.calls("torchrun")) == 2
    assert stderr.count("torchrun ended with 9") == 2

    stand_ins.add("torchrun", f'(( $(grep --count torchrun "{stand_ins.log}") == 4 ))')
    assert stand_ins.run("elastic_nodes.sh", "c.yaml", ATTEMPTS="5")[0] == 0
    assert len(stand_ins.calls("torchrun")) == 4


def test_a_mistake_in_the_configuration_is_not_tried_again(stand_ins: StandIns):
    stand_ins.add("chord-megatron", "exit 2")
    assert stand_ins.run("elastic_nodes.sh", "c.yaml")[0] == 2
    assert stand_ins.calls("torchrun") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_torchrun_and_ends_the_script(stand_ins: StandIns, number: signal.Signals):
    ended, log = f"echo ended >> {stand_ins.log}", stand_ins.log
    stand_ins.add("torchrun", f"trap '{ended}; exit 7' TERM; echo ready >> {log}; while :; do /bin/sleep 0.05; done")
    process = stand_ins.start("elastic_nodes.sh", "c.yaml")
    wait_until(lambda: "ready" in log.read_text().splitlines())
    process.send_signal(number)
    process.communicate(timeout=30)
    assert "ended" in log.read_text().splitlines()
    assert process.returncode == 128 + number
    assert len(stand_ins.calls("torchrun")) == 1


def test_docker_gets_secrets_by_name_and_much_shared_memory(stand_ins: StandIns):
    code, _ = stand_ins.run("docker.sh", "c.yaml", "a.b=1", CHORD_SERVER_TOKEN="hunter2", MODELS="/models")
    assert code == 0
    assert stand_ins.calls("docker") == [
        f"run --rm --init --name chord-train --user {os.getuid()}:{os.getgid()}"
        " --ipc host --ulimit memlock=-1 --ulimit stack=67108864"
        f" --volume {ROOT}:{ROOT} --workdir {ROOT} --env PYTHONSAFEPATH=1"
        " --env HF_TOKEN --env CHORD_SERVER_TOKEN"
        " --env WANDB_API_KEY --env WANDB_MODE --env SWANLAB_API_KEY --env SWANLAB_MODE"
        " --env MLFLOW_TRACKING_URI --env MLFLOW_TRACKING_TOKEN"
        " --gpus all --volume /models:/models:ro"
        " chord_megatron chord-megatron train c.yaml --nproc-per-node 4 a.b=1"
    ]


def test_a_sweep_is_a_run_for_each_combination_and_a_comparison(stand_ins: StandIns):
    code, stderr = stand_ins.run("../sweep/sweep.sh", "c.yaml", "a.b=1", RUNS="out", LRS="1e-6 2e-6", SEEDS="0 1")
    assert (code, stderr) == (0, "")
    runs = [(lr, seed, f"out/lr_{lr}/seed_{seed}") for lr in ("1e-6", "2e-6") for seed in (0, 1)]
    assert stand_ins.calls("chord-megatron") == [
        *(f"train c.yaml a.b=1 optimizer.lr={lr} train.seed={seed} train.output_dir={run}" for lr, seed, run in runs),
        f"compare {' '.join(run for *_, run in runs)}",
    ]


def test_slurm_starts_the_elastic_script_on_each_node(stand_ins: StandIns):
    stand_ins.add("scontrol", "printf 'a1\\na2\\n'")
    stand_ins.add("srun", f'echo "to $NNODES $NPROC_PER_NODE $RDZV_ENDPOINT $RDZV_ID" >> {stand_ins.log}; exit 3')
    code, _ = stand_ins.run("slurm.sbatch", "c.yaml", "a.b=1", NPROC_PER_NODE="", **SLURM, SLURM_RESTART_COUNT="1")
    assert code == 3
    assert stand_ins.calls("scontrol") == ["show hostnames a[1-2]", "--oneliner show job 12345"]
    assert stand_ins.calls("srun") == [
        "--kill-on-bad-exit=1 --cpu-bind=none examples/launch/elastic_nodes.sh c.yaml a.b=1"
    ]
    assert stand_ins.calls("to") == ["2 4 a1:22345 12345-1"]


def test_slurm_queues_the_job_again_before_its_time_limit(stand_ins: StandIns):
    stand_ins.add("srun", f'while ! grep requeue "{stand_ins.log}"; do /bin/sleep 0.05; done; /bin/sleep 0.3; exit 5')
    process = stand_ins.start("slurm.sbatch", "c.yaml", **SLURM, RDZV_HOST="a1")
    wait_until(lambda: len(stand_ins.calls("srun")) == 1)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert stand_ins.calls("scontrol") == ["requeue 12345", "--oneliner show job 12345"]
    assert process.returncode == 5, "it must wait for what Slurm ends"


# A time from the start of the grace time on, otherwise None.
@pytest.mark.parametrize(("preempt_time", "requeued"), [("2026-01-02T03:05:00", ["requeue 12345"]), ("None", [])])
def test_slurm_queues_a_job_that_ends_within_the_grace_time_of_a_preemption(
    stand_ins: StandIns, preempt_time: str, requeued: list[str]
):
    stand_ins.add("srun", "exit 143")
    stand_ins.add("scontrol", f"echo 'JobId=12345 PreemptEligibleTime=2026-01-02T03:04:00 PreemptTime={preempt_time}'")
    code, _ = stand_ins.run("slurm.sbatch", "c.yaml", **SLURM, RDZV_HOST="a1")
    assert code == 143
    assert stand_ins.calls("scontrol") == ["--oneliner show job 12345", *requeued]


def test_slurm_does_not_ask_about_a_job_that_succeeds(stand_ins: StandIns):
    assert stand_ins.run("slurm.sbatch", "c.yaml", **SLURM, RDZV_HOST="a1")[0] == 0
    assert stand_ins.calls("scontrol") == []


def test_slurm_reads_its_options_only_before_the_first_command():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = {line.removeprefix("#SBATCH ") for line in lines[:first_command] if line.startswith("#SBATCH ")}
    assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append", "--ntasks-per-node=1"} <= options
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
