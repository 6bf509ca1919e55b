"""Run examples/launch/slurm.sbatch on a real Slurm of its own: two nodes on this machine, interrupted three times.

Starts munged, slurmctld and two slurmd with a configuration in a temporary directory and submits the quickstart. A job
of a partition with a higher PriorityTier preempts it, first without a GraceTime, then with one; then comes the signal
that announces the time limit. Each time the job is queued again and resumes, and what it leaves is compared with an
uninterrupted run. Three to five minutes on two cores. Continuous integration does not run it, because it needs

    apt-get install --no-install-recommends slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge

Only the processes that it started are ended. No GPU may be visible: Slurm sets CUDA_VISIBLE_DEVICES for its jobs.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = "examples/quickstart/quickstart.yaml"
PARTITION, URGENT_PARTITION = "box", "urgent"
GRACE_SECONDS = 60
DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("box1", "box2")
TRAIN_ITERS, SAVE_STEPS = 15, 4
MEASURED = ("time_", "tokens_per_second", "peak_memory_bytes")  # differs between identical runs

SLURM_CONF = """\
ClusterName=box
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName={node_1} NodeAddr=127.0.0.1 NodeHostname=localhost Port={node_1_port} CPUs=1 Gres=gpu:1 State=UNKNOWN
NodeName={node_2} NodeAddr=127.0.0.1 NodeHostname=localhost Port={node_2_port} CPUs=1 Gres=gpu:1 State=UNKNOWN
PartitionName={partition} Nodes=ALL PriorityTier=1 Default=YES MaxTime=INFINITE State=UP
PartitionName={urgent_partition} Nodes=ALL PriorityTier=2 MaxTime=INFINITE State=UP
"""
# The script asks for GPUs, and Slurm wants to see a device for each that a node is said to have.
GRES_CONF = "Name=gpu File=/dev/null\n"


def main() -> int:
    """Run all of it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory")
    args = parser.parse_args()
    if missing := [name for name in DAEMONS if shutil.which(name) is None]:
        print(f"error: {', '.join(missing)} not found; see --help for the packages", file=sys.stderr)
        return 2
    directory = Path(tempfile.mkdtemp(prefix="slurm-box-"))
    try:
        assets = make_assets(directory)
        with slurm(directory) as environment:
            run_interrupted(directory, assets, environment)
        run_undisturbed(directory, assets)
        compare(directory)
    except BaseException:
        print(f"logs are in {directory}", file=sys.stderr)
        raise
    if not args.keep:
        shutil.rmtree(directory)
    return 0


@contextlib.contextmanager
def slurm(directory: Path) -> Iterator[dict[str, str]]:
    """The daemons; yields the environment in which Slurm's commands find them."""
    directory.chmod(0o711)  # munged insists that others can reach its socket
    (directory / "state").mkdir()
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    configuration = directory / "slurm.conf"
    ports = dict(zip(("controller_port", "node_1_port", "node_2_port"), free_ports(3)))
    names = {"user": getpass.getuser(), "node_1": NODES[0], "node_2": NODES[1]}
    partitions = {"partition": PARTITION, "urgent_partition": URGENT_PARTITION}
    configuration.write_text(SLURM_CONF.format(directory=directory, **names, **partitions, **ports))
    (directory / "gres.conf").write_text(GRES_CONF)
    environment = {**os.environ, "SLURM_CONF": str(configuration), **python_environment()}
    munge_files = [f"--{name}={directory}/munge.{name.split('-')[0]}" for name in ("pid-file", "log-file", "seed-file")]
    with contextlib.ExitStack() as stack:
        commands = [
            ["munged", "--foreground", f"--socket={directory}/munge.socket", f"--key-file={key}", *munge_files],
            ["slurmctld", "-D", "-f", str(configuration)],
            *(["slurmd", "-D", "-N", node, "-f", str(configuration)] for node in NODES),
        ]
        for number, command in enumerate(commands):
            stack.enter_context(daemon(command, directory / f"daemon.{number}.log", environment))
            if command[0] == "munged":
                wait_for((directory / "munge.socket").exists, "munged", seconds=30)
        wait_for(lambda: "idle" in capture(["sinfo", "--noheader", "-o", "%T"], environment), "the nodes", seconds=60)
        say(capture(["sinfo", "--Node"], environment))
        stack.callback(cancel_all, environment)
        yield environment


@contextlib.contextmanager
def daemon(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    """A process in the foreground, and ended by its id."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        yield
    finally:
        process.terminate()
        code = process.wait(timeout=30)
        say(f"{command[0]} (process {process.pid}) ended with {code}")


def run_interrupted(directory: Path, assets: list[str], environment: dict[str, str]) -> None:
    """Submit the script, interrupt the job after three of its checkpoints, and see it to its end."""
    run, log = directory / "slurm_run", directory / "job.log"
    resources = [f"--nodes={len(NODES)}", "--gpus-per-node=1"]
    submit = ["sbatch", "--parsable", *resources, f"--output={log}"]
    job = capture([*submit, "examples/launch/slurm.sbatch", RECIPE, f"train.output_dir={run}", *assets], environment)
    say(f"job {job} submitted")
    urgent_job = ["srun", f"--partition={URGENT_PARTITION}", *resources, "true"]
    interrupt(urgent_job, 1, run, job, environment)
    say(find(f"preempted JobId={job} has been requeued", directory / "slurmctld.log"))
    capture(["scontrol", "update", f"PartitionName={PARTITION}", f"GraceTime={GRACE_SECONDS}"], environment)
    interrupt(urgent_job, 2, run, job, environment)
    say(find("preempted: back to the queue", log))
    interrupt(["scancel", "--batch", "--signal=USR1", job], 3, run, job, environment)
    say(find("the time limit is near: back to the queue", log))
    wait_for(lambda: "JobState=COMPLETED" in show(job, environment), "the end of the job", seconds=300)
    say(fields(show(job, environment), "JobState", "Restarts", "ExitCode", "NodeList", "BatchHost"))
    resumed = [int(step) for step in re.findall(r"resuming .* at step (\d+)", log.read_text())]
    say(f"resumed at {resumed}")
    assert resumed == [SAVE_STEPS, 2 * SAVE_STEPS, 3 * SAVE_STEPS], log.read_text()[-4000:]


def interrupt(command: list[str], count: int, run: Path, job: str, environment: dict[str, str]) -> None:
    """Have the job queued again, for the count-th time, between its count-th checkpoint and the next."""
    checkpoint = count * SAVE_STEPS
    # Beyond the checkpoint, so that there is work to lose.
    wait_for(lambda: latest(run) == checkpoint and num_steps(run) > checkpoint, f"step {checkpoint}", seconds=300)
    say(f"step_{checkpoint} is saved, {num_steps(run)} steps are logged: {' '.join(command)}")
    capture(command, environment)
    wait_for(lambda: f"Restarts={count} " in show(job, environment), "the requeue", seconds=60)
    say(fields(show(job, environment), "JobState", "Restarts"))


def find(text: str, log: Path) -> str:
    """The one line of a log that has the text."""
    (line,) = [line for line in log.read_text().splitlines() if text in line]
    return line


def run_undisturbed(directory: Path, assets: list[str]) -> None:
    """The same run without Slurm and without an interruption."""
    command = ["chord-megatron", "train", RECIPE, f"train.output_dir={directory / 'undisturbed'}", *assets]
    capture([*command, "--nproc-per-node", str(len(NODES))], {**os.environ, **python_environment()})


def compare(directory: Path) -> None:
    """Every step once, with the same numbers, and the same weights to the bit."""
    runs = [directory / name for name in ("slurm_run", "undisturbed")]
    interrupted, undisturbed = ([strip(line) for line in read_metrics(run)] for run in runs)
    assert [line["step"] for line in interrupted] == list(range(TRAIN_ITERS)), interrupted
    assert interrupted == undisturbed
    files = [run / "hf" / f"step_{TRAIN_ITERS}" / "model.safetensors" for run in runs]
    assert files[0].read_bytes() == files[1].read_bytes()
    say(f"{TRAIN_ITERS} steps, each logged once; metrics and final weights are those of an undisturbed run, bit by bit")


def make_assets(directory: Path) -> list[str]:
    """The quickstart's model and data, and the overrides that make it small and use them."""
    assets = directory / "assets"
    capture([sys.executable, "examples/quickstart/make_quickstart.py", "--output-dir", str(assets)], dict(os.environ))
    return [
        f"model.path={assets / 'model'}",
        f"data.dataset={assets / 'prompts.jsonl'}",
        "data.eval_dataset=null",
        f"chord.chord_sft_dataset={assets / 'experts.jsonl'}",
        "chord.chord_sft_global_batch_size=8",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
        f"train.train_iters={TRAIN_ITERS}",
        f"train.save_steps={SAVE_STEPS}",
        "train.eval_steps=null",
        "tracking.report_to=[]",
    ]


def python_environment() -> dict[str, str]:
    """This interpreter's commands first, no GPU, and the loopback device for torchrun and gloo."""
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "RDZV_HOST": "127.0.0.1",
        "LOCAL_ADDR": "127.0.0.1",
    }


def cancel_all(environment: dict[str, str]) -> None:
    """End what still runs before the daemons go: nobody would end the steps after them."""
    capture(["scancel", "--user", getpass.getuser()], environment)
    wait_for(lambda: not capture(["squeue", "--noheader"], environment), "the queue to be empty", seconds=60)


def capture(command: list[str], environment: dict[str, str]) -> str:
    """What a command prints. Raises RuntimeError with its errors."""
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    if result.returncode:
        raise RuntimeError(f"{command} ended with {result.returncode}: {result.stderr[-2000:]}")
    return result.stdout.strip()


def wait_for(condition: Callable[[], bool], what: str, *, seconds: float) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def show(job: str, environment: dict[str, str]) -> str:
    return capture(["scontrol", "--oneliner", "show", "job", job], environment)


def fields(shown: str, *names: str) -> str:
    return " ".join(field for field in shown.split() if field.partition("=")[0] in names)


def latest(run: Path) -> int | None:
    path = run / "checkpoints" / "latest"
    return int(path.read_text().strip().removeprefix("step_")) if path.exists() else None


def num_steps(run: Path) -> int:
    return len(read_metrics(run))


def read_metrics(run: Path) -> list[dict[str, object]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def strip(line: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in line.items() if not key.startswith(MEASURED)}


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
