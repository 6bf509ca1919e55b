"""`chord-megatron init`: a first, commented configuration from a model directory and a data file."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chord_megatron.cli.options import ProcessesPerNode

if TYPE_CHECKING:
    from chord_megatron.inspection.recipe import Material


def init(
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="a Hugging Face folder")],
    data_file: Annotated[str, typer.Argument(metavar="DATA_FILE", help="prompts, as data.dataset")],
    *,
    experts: Annotated[
        str | None, typer.Option(metavar="FILE", help="worked answers, if in a file of their own")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FILE.yaml", help="a new file")] = Path("my.yaml"),
    nproc_per_node: ProcessesPerNode = 1,
) -> int:
    """Write a configuration that passes `validate` as it stands, with the reason for each value in a comment.

    It follows from the model's config.json and tokenizer and the first rows of the data; nothing is run.
    """
    from chord_megatron.inspection.recipe import free_name, make_recipe
    from chord_megatron.inspection.visible import visible

    _refuse(output)
    recipe = make_recipe(_material(model_dir, data_file, experts, nproc_per_node), free_name(Path("runs"), output.stem))
    _write(output, recipe.text)
    print("\n".join(map(visible, recipe.found)))
    on = f" --nproc-per-node {nproc_per_node}" if nproc_per_node > 1 else ""
    print(f"wrote {output}; now:")
    for command in (f"data show {output}", f"validate {output}{on}", f"train {output}{on}"):
        print(f"  chord-megatron {command}")
    return 0


def _material(model_dir: Path, data_file: str, experts: str | None, processes: int) -> Material:
    from chord_megatron.data.segments import TokenWeights
    from chord_megatron.data.tokenizer import load_tokenizer
    from chord_megatron.data.turns import build_turns
    from chord_megatron.inspection.guess import guess_experts, guess_prompts
    from chord_megatron.inspection.recipe import Material
    from chord_megatron.weights.hf_config import read_architecture

    arch = read_architecture(model_dir)
    tokenizer = load_tokenizer(model_dir, trust_remote_code=False)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    build = partial(build_turns, tokenizer, "chat" if has_template else "text", template_kwargs={})
    find_experts = partial(
        guess_experts, experts or data_file, token_weights=TokenWeights(tokenizer), must=experts is not None
    )
    room = arch.max_position_embeddings
    prompts = guess_prompts(data_file, build, find_experts(build(None)), has_template=has_template, room=room)
    return Material(
        model_dir=str(model_dir),
        arch=arch,
        has_template=has_template,
        prompts=prompts,
        experts=find_experts(build(prompts.system_prompt)),
        processes=processes,
    )


def _refuse(output: Path) -> None:
    from chord_megatron.system.errors import UserError

    if os.path.lexists(output):
        raise UserError(f"--output {output} is there already; name another file, or remove it")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist; make it, or name another file")


def _write(output: Path, text: str) -> None:
    """Never over a file that came meanwhile."""
    from chord_megatron.system.errors import UserError

    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
