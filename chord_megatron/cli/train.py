"""`chord-megatron train`: checks the configuration, then trains here or in several processes."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from chord_megatron.cli.options import ConfigFile, Nodes, Overrides, ProcessesPerNode, validated
from chord_megatron.system.errors import UserError
from chord_megatron.system.launcher import Launch, run_processes
from chord_megatron.system.processes import end_before_the_run, stop_signals_to
from chord_megatron.system.sentences import counted


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
    launch = Launch(nproc_per_node, nnodes, node_rank, master_addr, master_port)
    if node_rank >= nnodes:
        raise UserError(f"--node-rank {node_rank} is not one of {nnodes} nodes; they count from 0 to {nnodes - 1}")
    with stop_signals_to(end_before_the_run):
        from chord_megatron.training.beginning import finished

        # Here: a mistake shows before any process starts.
        resolved, _ = validated(config, overrides, launch.world_size)
        sentence = finished(resolved)
        if launch.world_size == 1 and sentence is None:
            from chord_megatron.training.main import main
    if sentence is not None:
        print(sentence)
        return 0
    print(f"{config} is checked; starting {counted(launch.nproc_per_node, 'process', 'processes')}", flush=True)
    # A model of the hub has a folder by now, the same for all ranks.
    arguments = [str(config), *(overrides or []), f"model.path={json.dumps(resolved.model.path)}"]
    if launch.world_size == 1:
        return main(arguments)
    command = [sys.executable, "-m", "chord_megatron.train", *arguments]
    return run_processes(launch, command, finishes_its_step=resolved.train.save_on_signal)
