"""`chord-megatron data show`: what a model reads and learns of the data of a configuration."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chord_megatron.cli.options import ConfigFile, Overrides, PrintJson

if TYPE_CHECKING:
    from chord_megatron.inspection.look import Inspection


def show(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    rows: Annotated[int, typer.Option(min=1, help="so many of each data set become tokens; of more, a sample")] = 1000,
    show: Annotated[int, typer.Option(min=0, help="so many of each are shown, token by token")] = 3,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="write one page, in place of a file of that name")
    ] = None,
    print_json: PrintJson = False,
) -> int:
    """What the model reads: rows with their roles, special and trained tokens, lengths, what is left out, duplicates.

    Expert answers are given to the reward functions, in their processes, as in training. Of the model, config.json
    and the tokenizer are read.
    """
    from chord_megatron.system.errors import UserError

    if html is not None and (html.suffix != ".html" or not html.absolute().parent.is_dir()):
        raise UserError(f"--html {html} must be a file named *.html in a folder that exists; name another")
    found = _inspect(config, overrides, rows, show)
    if html is not None:
        from chord_megatron.inspection.page import page_of
        from chord_megatron.system.atomic import atomic_write

        atomic_write(html, [page_of(found).encode("utf-8", errors="replace")])
    if print_json:
        from chord_megatron.system.files import json_text

        print(json_text(_document(found)))
    else:
        _print(found, html)
    return 0


def _inspect(config: Path, overrides: list[str] | None, rows: int, show: int) -> Inspection:
    from chord_megatron.config import load_config
    from chord_megatron.data.hub import with_local_model
    from chord_megatron.data.tokenizer import load_tokenizer
    from chord_megatron.inspection.look import inspect_data
    from chord_megatron.planning.batches import expert_max_length
    from chord_megatron.weights.hf_config import read_architecture

    resolved = with_local_model(load_config(config, overrides), weights=False)
    model_dir = Path(resolved.model.path)
    arch = read_architecture(model_dir)
    return inspect_data(
        resolved,
        load_tokenizer(model_dir, trust_remote_code=resolved.model.trust_remote_code),
        model_length=arch.max_position_embeddings,
        expert_max_length=expert_max_length(resolved, arch),
        sample=rows,
        show=show,
    )


def _document(found: Inspection) -> dict[str, Any]:
    from chord_megatron.inspection.findings import findings

    return {"findings": findings(found), **asdict(found)}


def _print(found: Inspection, html: Path | None) -> None:
    import io

    from rich.console import Console

    from chord_megatron.inspection.text import print_inspection

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not have all characters of the data
    print_inspection(found, Console())
    if html is not None:
        print(f"wrote {html}")
