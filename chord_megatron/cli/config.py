"""`chord-megatron config`: what the keys of a configuration are."""

from __future__ import annotations

from typing import Annotated

import typer

from chord_megatron.cli.options import PrintJson


def config(
    explain: Annotated[str | None, typer.Option(metavar="KEY", help="with or without its group; or a group")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON Schema, for editors")] = False,
    print_json: PrintJson = False,
) -> int:
    """Explain a key (all of them without --explain), or print the JSON Schema of configuration files."""
    from chord_megatron.config.reference import all_keys, find_keys, json_schema
    from chord_megatron.system.files import json_text

    if schema:
        print(json_text(json_schema()))
        return 0
    keys = find_keys(explain) if explain is not None else all_keys()
    if print_json:
        rows = [{"key": key.name, "default": key.default, "description": key.plain_description} for key in keys]
        print(json_text(rows))
        return 0
    for key in keys:
        print(f"{key.name}  (default: {key.default})\n  {key.plain_description}")
    return 0
