"""`chord-megatron config`: what the keys of a configuration are."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def config(
    explain: Annotated[str | None, typer.Option(metavar="KEY", help="with or without its group; or a group")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON Schema, for editors")] = False,
    print_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> int:
    """Explain a key (all of them without --explain), or print the JSON Schema of configuration files."""
    from chord_megatron.config.reference import all_keys, find_keys, json_schema

    if schema:
        print(json.dumps(json_schema(), indent=2))
        return 0
    keys = find_keys(explain) if explain is not None else all_keys()
    if print_json:
        rows = [{"key": key.name, "default": key.default, "description": key.plain_description} for key in keys]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    for key in keys:
        print(f"{key.name}  (default: {key.default})\n  {key.plain_description}")
    return 0
