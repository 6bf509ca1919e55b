"""`chord-megatron import`: another trainer's script or arguments as a configuration of this package."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from chord_megatron.importers.recipe import Recipe

# The arguments of the other trainer look like options, and are none of this command's.
SETTINGS = {"ignore_unknown_options": True}


def import_(
    trainer: Annotated[str, typer.Argument(metavar="ms-swift|trl|verl")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="SCRIPT|CONFIG|ARGUMENTS...", help="a script, a YAML or JSON file, arguments"),
    ] = None,
    nproc_per_node: Annotated[
        int | None, typer.Option("--nproc-per-node", min=1, help="where the script does not say it")
    ] = None,
    nnodes: Annotated[int | None, typer.Option("--nnodes", min=1, help="where the script does not say it")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="configuration and remarks as JSON")] = False,
) -> int:
    """Print the configuration that does what another trainer's script does. A script is read, and never run.

    Remarks (what is near, what is left out, what is not known) go to stderr, and as comments into the YAML.
    """
    from chord_megatron.importers.importing import import_words
    from chord_megatron.system.files import json_text

    recipe = import_words(trainer, words or [], nproc_per_node=nproc_per_node, nnodes=nnodes)
    for remark in recipe.remarks:
        print(remark, file=sys.stderr)
    print(json_text(_as_json(recipe)) if as_json else recipe.to_yaml().rstrip())
    return 0


def _as_json(recipe: Recipe) -> dict[str, object]:
    return {
        "trainer": recipe.trainer,
        "nproc_per_node": recipe.nproc_per_node,
        "nnodes": recipe.nnodes,
        "config": recipe.groups(),
        "origins": recipe.origins,
        "remarks": [vars(remark) for remark in recipe.remarks],
        "without_effect": [{"flag": flag, "text": why} for flag, why in recipe.without_effect],
    }
