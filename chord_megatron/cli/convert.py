"""The command line of `chord-megatron convert`: between Hugging Face and Megatron checkpoints."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import say

if TYPE_CHECKING:
    import torch

    from chord_megatron.checkpoints import conversion
    from chord_megatron.weights.architecture import ModelArchitecture

app = typer.Typer(
    help="Convert checkpoints between Hugging Face and Megatron: one process, no GPU, a few tensors in memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_UNITS = {None: 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class Dtype(StrEnum):
    """Values of --dtype."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="dtype of the weights that are written (default: as they are)")
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify", help="read DST back, compare every bit with SRC, and log-probs with transformers where they fit"
    ),
]
Source = Annotated[Path, typer.Argument(metavar="SRC")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="must not exist")]


@app.command("hf-to-megatron")
def hf_to_megatron(source: Source, target: Target, dtype: DtypeOption = None, verify: VerifyOption = False) -> None:
    """Write the Megatron checkpoint DST, which loads under any layout, from the Hugging Face folder SRC."""
    from chord_megatron.checkpoints import conversion

    with _exit_codes():
        with _progress_bar() as progress:
            done = conversion.hf_to_megatron(
                source,
                target,
                dtype=_torch_dtype(dtype),
                verify=verify,
                compare_log_probs=_max_log_prob_difference,
                progress=progress,
            )
        _report(target, done)


@app.command("megatron-to-hf")
def megatron_to_hf(
    source: Source,
    target: Target,
    hf_config: Annotated[
        Path | None, typer.Option("--hf-config", metavar="DIR", help="folder with config.json and tokenizer")
    ] = None,
    dtype: DtypeOption = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="such as 5GB, 500MB, 2GiB")] = "5GB",
    verify: VerifyOption = False,
) -> None:
    """Write the Hugging Face folder DST from a checkpoint of a run, of Megatron-LM or of hf-to-megatron."""
    from chord_megatron.checkpoints import conversion

    with _exit_codes():
        with _progress_bar() as progress:
            done = conversion.megatron_to_hf(
                source,
                target,
                hf_config=hf_config,
                dtype=_torch_dtype(dtype),
                max_shard_bytes=_parse_size(max_shard_size),
                verify=verify,
                compare_log_probs=_max_log_prob_difference,
                progress=progress,
            )
        _report(target, done)


def _max_log_prob_difference(megatron_dir: Path, hf_dir: Path, arch: ModelArchitecture) -> float | None:
    from chord_megatron.backend.importing import silence_cuda_advice
    from chord_megatron.backend.log_prob_check import max_log_prob_difference

    silence_cuda_advice()
    return max_log_prob_difference(megatron_dir, hf_dir, arch)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """2 for what the user can mend, 130 for an interrupt; a sentence on standard error for both."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it cleans up as Ctrl-C does
    try:
        yield
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None


@contextmanager
def _progress_bar() -> Iterator[conversion.Progress]:
    """A bar on standard error where that is a terminal."""
    from rich import progress
    from rich.console import Console

    from chord_megatron.checkpoints import conversion

    console = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: list[progress.TaskID] = []

        def start(description: str, nbytes: int) -> None:
            for earlier in tasks:
                bar.remove_task(earlier)
            tasks[:] = [bar.add_task(description, total=nbytes)]

        yield conversion.Progress(start, lambda nbytes: bar.advance(tasks[0], nbytes))


def _report(target: Path, done: conversion.Conversion) -> None:
    gigabytes = done.nbytes / 1e9
    print(f"wrote {target}: {gigabytes:.2f} GB in {done.seconds:.1f} s ({gigabytes / done.seconds:.2f} GB/s)")
    for line in (*done.left_out, *done.checks):
        print(line)


def _torch_dtype(dtype: Dtype | None) -> torch.dtype | None:
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(Ki|Mi|Gi|k|M|G)?B?", text, re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text} is not a size; write it as 5GB, 500MB or 2GiB")
    return size
