"""Arguments that several commands have, and reading the configuration that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from chord_megatron.config import Config
    from chord_megatron.planning.plan import Plan

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="such as optimizer.lr=1e-6")]
ProcessesPerNode = Annotated[
    int, typer.Option("--nproc-per-node", min=1, help="processes on each node, as in torchrun")
]
PrintJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Nodes = Annotated[int, typer.Option("--nnodes", min=1, help="nodes, as in torchrun")]


def validated(
    config: Path, overrides: list[str] | None, world_size: int, *, loads_weights: bool = True
) -> tuple[Config, Plan]:
    """The configuration, its model on this machine, with its plan. Raises UserError.

    loads_weights: of a model of the hub; otherwise what can be known without them is all that is fetched.
    """
    from chord_megatron.config import load_config
    from chord_megatron.data.hub import with_local_model
    from chord_megatron.planning.megatron import asks_megatron
    from chord_megatron.planning.plan import make_plan
    from chord_megatron.planning.rewards import scores_completions
    from chord_megatron.rewards import check_reward_functions
    from chord_megatron.training.objective import build_objective
    from chord_megatron.weights.hf_config import read_architecture

    resolved = with_local_model(load_config(config, overrides), weights=loads_weights)
    if scores_completions(resolved):
        check_reward_functions(resolved.rewards.reward_funcs, resolved.rewards.reward_weights)
    arch = read_architecture(Path(resolved.model.path))
    plan = make_plan(resolved, arch, world_size)
    if asks_megatron(resolved):
        from chord_megatron.backend.preflight import check_machine

        check_machine(resolved, arch)
    build_objective(resolved.grpo, resolved.chord)  # functions of the user's are loaded and tried
    return resolved, plan
