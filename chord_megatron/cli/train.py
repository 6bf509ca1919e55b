"""`chord-megatron train`: checks the configuration, then trains here or in several processes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from chord_megatron.cli.options import ConfigFile, Nodes, Overrides, ProcessesPerNode, validated
from chord_megatron.system.errors import UserError
from chord_megatron.system.launcher import Launch, run_processes


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
    from chord_megatron.training.beginning import finished

    launch = Launch(nproc_per_node, nnodes, node_rank, master_addr, master_port)
    if node_rank >= nnodes:
        raise UserError(f"--node-rank {node_rank} is not one of {nnodes} nodes; they count from 0 to {nnodes - 1}")
    resolved, _ = validated(config, overrides, launch.world_size)  # here: a mistake shows before any process starts
    if (sentence := finished(resolved)) is not None:
        print(sentence)
        return 0
    arguments = [str(config), *(overrides or [])]
    if launch.world_size > 1:
        command = [sys.executable, "-m", "chord_megatron.train", *arguments]
        return run_processes(launch, command, finishes_its_step=resolved.train.save_on_signal)
    from chord_megatron.training.main import main

    return main(arguments)
