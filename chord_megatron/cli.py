"""The command line: `chord-megatron train | validate | doctor | report | convert | serve`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from chord_megatron import cli_convert, cli_serve
from chord_megatron.config import Config, load_config
from chord_megatron.convert.hf_config import read_architecture
from chord_megatron.plan import Plan, make_plan, mu_at
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.types import UserError

app = typer.Typer(
    help="CHORD training on Megatron-Core models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_convert.app, name="convert")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="such as optimizer.lr=1e-6")]
ProcessesPerNode = Annotated[
    int, typer.Option("--nproc-per-node", min=1, help="processes on each node, as in torchrun")
]
Nodes = Annotated[int, typer.Option("--nnodes", min=1, help="nodes, as in torchrun")]


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Register a subcommand that returns its exit code; a UserError is one sentence and exit code 2."""

    @app.command()
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = function(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        raise typer.Exit(code)

    return function


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


@command
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
    arguments = [str(config), *(overrides or [])]
    resolved, _ = _validated(arguments, launch.world_size)  # here: a mistake shows before any process starts
    if RunDir(Path(resolved.train.output_dir)).is_finished(resolved.train.train_iters):
        print(f"{resolved.train.output_dir} is finished; raise train.train_iters to train on")
        return 0
    if launch.world_size > 1:
        return _launch(launch, arguments)
    from chord_megatron.train import main as train_main

    return train_main(arguments)


@command
def validate(
    config: ConfigFile, overrides: Overrides = None, nproc_per_node: ProcessesPerNode = 1, nnodes: Nodes = 1
) -> int:
    """Check a configuration; print its batch arithmetic and parallel layout. Loads nothing."""
    resolved, plan = _validated([str(config), *(overrides or [])], nproc_per_node * nnodes)
    Console().print(_plan_table(resolved, plan))
    return 0


@command
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]")] = None,
    overrides: Overrides = None,
    nproc_per_node: ProcessesPerNode = 1,
    nnodes: Nodes = 1,
    print_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> int:
    """Say what this machine has and what replaces the rest; exit code 1 where training, or CONFIG, cannot run."""
    from chord_megatron.doctor import examination
    from chord_megatron.doctor.report import as_json, as_table, problems

    if config is None:
        checks = examination.examine()
    else:
        resolved, plan = _validated([str(config), *(overrides or [])], nproc_per_node * nnodes)
        arch = read_architecture(Path(resolved.model.path))
        checks = examination.examine_for(resolved, arch, plan, nproc_per_node)
    if print_json:
        print(as_json(checks))
    else:
        Console().print(as_table(checks))
        if not problems(checks):
            what = "training" if config is None else "this run\n(its data, rewards and servers were not looked at)"
            print(f"\nnothing on this machine stands in the way of {what}")
    for problem in problems(checks):
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems(checks) else 0


@command
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")]) -> int:
    """Write report.html and report.png of a run, finished or not."""
    from chord_megatron.tracking.report import write_report
    from chord_megatron.tracking.summary import print_summary

    paths = write_report(run_dir)
    print_summary(run_dir, Console())
    print(*paths, sep="\n")
    return 0


command(cli_serve.serve)


def _validated(arguments: list[str], world_size: int) -> tuple[Config, Plan]:
    config = load_config(arguments[0], arguments[1:])
    return config, make_plan(config, read_architecture(Path(config.model.path)), world_size)


def _launch(launch: Launch, arguments: list[str]) -> int:
    """torchrun -m chord_megatron.train, without its traceback of a child that already said what was wrong."""
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    options = [f"--nproc-per-node={launch.nproc_per_node}", f"--nnodes={launch.nnodes}"]
    if launch.nnodes > 1:
        options += [
            f"--node-rank={launch.node_rank}",
            f"--master-addr={launch.master_addr}",
            f"--master-port={launch.master_port}",
        ]
    else:
        # What --standalone means: a free port on the loopback device.
        options += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", f"--rdzv-id={os.getpid()}"]
    # One compute thread a process, unless the user says otherwise: torchrun's own default, without its warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    run = parse_args([*options, "-m", "chord_megatron.train", *arguments])
    config, command, command_arguments = config_from_args(run)
    try:
        elastic_launch(config=config, entrypoint=command)(*command_arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _plan_table(config: Config, plan: Plan) -> Table:
    parallel, train = config.parallel, config.train
    last = train.train_iters - 1
    table = Table(show_header=False, title="What one optimizer step does", title_justify="left")
    for name, value in (
        ("prompts", f"{plan.prompts_per_step}"),
        (
            "completions",
            f"{plan.completions_per_step} = {plan.prompts_per_step} prompts x {config.rollout.num_generations}",
        ),
        ("expert rows", f"{plan.expert_rows_per_step}"),
        (
            "micro-batches",
            f"{plan.micro_batches_per_step} a data-parallel rank, of up to {train.micro_batch_size} packed sequences",
        ),
        ("rollouts", f"{config.rollout.engine}, new ones every {plan.steps_per_rollout} step(s)"),
        (
            "layout",
            f"{plan.world_size} processes = TP {parallel.tensor_model_parallel_size}"
            f" x PP {parallel.pipeline_model_parallel_size} x DP {plan.data_parallel_size}"
            + (
                f", VPP {parallel.virtual_pipeline_model_parallel_size}"
                * bool(parallel.virtual_pipeline_model_parallel_size)
            )
            + ", sequence parallel" * parallel.sequence_parallel
            + ", distributed optimizer" * config.optimizer.use_distributed_optimizer,
        ),
        ("mu", f"{mu_at(config, 0):.3g} at step 0, {mu_at(config, last):.3g} at step {last}"),
        ("steps", f"{train.train_iters}, into {train.output_dir}"),
    ):
        table.add_row(name, value)
    return table


if __name__ == "__main__":
    app()
