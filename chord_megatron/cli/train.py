"""`chord-megatron train`: checks the configuration, then trains here or under torchrun."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from chord_megatron.cli.options import ConfigFile, Nodes, Overrides, ProcessesPerNode, validated
from chord_megatron.system.errors import UserError
from chord_megatron.system.processes import STORE_FILE


@dataclass(frozen=True)
class Launch:
    """How many processes, and where they meet."""

    nproc_per_node: int
    nnodes: int
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500

    @property
    def world_size(self) -> int:
        return self.nproc_per_node * self.nnodes


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc_per_node: ProcessesPerNode = 1,
    nnodes: Nodes = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="this node's number")] = 0,
    master_addr: Annotated[str, typer.Option(help="address of node 0")] = "127.0.0.1",
    master_port: Annotated[int, typer.Option(help="port on node 0")] = 29500,
) -> int:
    """Train. The same command again resumes from the latest checkpoint."""
    from chord_megatron.tracking.run_dir import RunDir

    launch = Launch(nproc_per_node, nnodes, node_rank, master_addr, master_port)
    if node_rank >= nnodes:
        raise UserError(f"--node-rank {node_rank} is not one of {nnodes} nodes; they count from 0 to {nnodes - 1}")
    resolved, _ = validated(config, overrides, launch.world_size)  # here: a mistake shows before any process starts
    if RunDir(Path(resolved.train.output_dir)).is_finished(resolved.train.train_iters):
        print(f"{resolved.train.output_dir} is finished; raise train.train_iters to train on")
        return 0
    arguments = [str(config), *(overrides or [])]
    if launch.world_size > 1:
        return _launch(launch, arguments)
    from chord_megatron.training.main import main

    return main(arguments)


def _launch(launch: Launch, arguments: list[str]) -> int:
    """torchrun -m chord_megatron.train, without its traceback of a child that already said what was wrong."""
    with ExitStack() as resources:
        if launch.nnodes == 1:
            meeting = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="chord-")))  # the user's alone
            return _run_agent(launch, _on_one_node(meeting), arguments)
        options = [
            f"--node-rank={launch.node_rank}",
            f"--master-addr={launch.master_addr}",
            f"--master-port={launch.master_port}",
        ]
        return _run_agent(launch, options, arguments)


def _on_one_node(meeting: Path) -> list[str]:
    """Agent and processes meet through files: torch's TCPStore listens on every interface, for everybody."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # the agent's own, for its processes
    os.environ[STORE_FILE] = str(meeting / "processes")
    return [
        "--rdzv-backend=c10d",
        "--rdzv-conf=store_type=file",
        f"--rdzv-endpoint={meeting / 'agent'}",
        f"--rdzv-id={os.getpid()}",
        "--local-addr=127.0.0.1",
    ]


def _run_agent(launch: Launch, options: list[str], arguments: list[str]) -> int:
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    # One compute thread per process, unless the user says otherwise: torchrun's own default, without its warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    counts = [f"--nproc-per-node={launch.nproc_per_node}", f"--nnodes={launch.nnodes}"]
    run = parse_args([*counts, *options, "-m", "chord_megatron.train", *arguments])
    config, command, command_arguments = config_from_args(run)
    try:
        elastic_launch(config=config, entrypoint=command)(*command_arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0
