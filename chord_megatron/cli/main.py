"""The command line: `chord-megatron train | validate | doctor | plan | report | convert | serve`. A file a command.

Commands import what they run when they run, so that `--help` is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from chord_megatron import __version__
from chord_megatron.cli import convert
from chord_megatron.cli.doctor import doctor
from chord_megatron.cli.plan import plan
from chord_megatron.cli.report import report
from chord_megatron.cli.serve import serve
from chord_megatron.cli.train import train
from chord_megatron.cli.validate import validate
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import say

app = typer.Typer(
    help="CHORD training on Megatron-Core models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"chord_megatron {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """What stands before the command."""


def _add(command: Callable[..., int]) -> None:
    """Register a command that returns its exit code; a UserError is one sentence and exit code 2."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = command(*args, **kwargs)
        except UserError as error:
            say(f"error: {error}", sys.stderr)
            code = 2
        except KeyboardInterrupt:
            code = 130  # 128 + SIGINT, as of any program that it ends
        raise typer.Exit(code)

    app.command()(run)


for _command in (train, validate, doctor, plan, report, serve):
    _add(_command)
app.add_typer(convert.app, name="convert")
