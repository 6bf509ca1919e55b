"""The command line: `chord-megatron init | data | train | evaluate | report | compare | ...`.

A file a command. Commands import what they run when they run, so that `--help` is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from chord_megatron import __version__
from chord_megatron.cli import convert
from chord_megatron.cli.compare import compare
from chord_megatron.cli.config import config
from chord_megatron.cli.data import show
from chord_megatron.cli.doctor import doctor
from chord_megatron.cli.evaluate import evaluate
from chord_megatron.cli.import_ import SETTINGS, import_
from chord_megatron.cli.init import init
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


def _add(command: Callable[..., int], to: typer.Typer = app, **how: Any) -> None:
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

    to.command(**how)(run)


for _command in (init, train, evaluate, validate, config, doctor, plan, report, compare, serve):
    _add(_command)
_add(import_, name="import", context_settings=SETTINGS)
app.add_typer(convert.app, name="convert")
data = typer.Typer(help="Look at the data of a configuration.", no_args_is_help=True)
_add(show, data)
app.add_typer(data, name="data")
