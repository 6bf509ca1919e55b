"""`chord-megatron plan`: a layout of a configuration for so many GPUs, with its memory and time; nothing is run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chord_megatron.cli.options import ConfigFile, Overrides, PrintJson
from chord_megatron.system.sentences import counted

if TYPE_CHECKING:
    from rich.table import Table

    from chord_megatron.config import Config
    from chord_megatron.planning.gpus import Assumptions, Cluster
    from chord_megatron.planning.proposals import Proposal, Search

_MOST_GPUS = 1_000_000  # all their divisors are tried


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    gpus: Annotated[int | None, typer.Option(min=1, help="how many")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="full nodes, in place of --gpus")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    gpu: Annotated[str, typer.Option(help="which: a100, h100, h800, h20, h200, b200, b300")] = "h100",
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="share of its peak that computing reaches")] = 0.5,
    show: Annotated[int, typer.Option(min=1, help="so many layouts in the table")] = 8,
    output: Annotated[Path | None, typer.Option(help="a new file for what is proposed")] = None,
    print_json: PrintJson = False,
) -> int:
    """Propose a layout for GPUs that need not be here: what fits, memory and time by part. Computed, not measured.

    Of the model only config.json is read.
    """
    from chord_megatron.config import load_config
    from chord_megatron.data.hub import with_local_model
    from chord_megatron.planning.gpus import Assumptions, Cluster, gpu_named
    from chord_megatron.planning.proposals import search
    from chord_megatron.system.files import json_text
    from chord_megatron.weights.hf_config import read_architecture

    cluster = Cluster(gpu_named(gpu), _count(gpus, nodes, gpus_per_node), gpus_per_node)
    before = with_local_model(load_config(config, overrides), weights=False)
    _refuse_output(output)
    assumptions = Assumptions(mfu=mfu)
    found = search(before, read_architecture(Path(before.model.path)), cluster, assumptions)
    if output is not None:
        _write(output, found.best.layout.config)
    if print_json:
        print(json_text(_document(before, found, cluster, assumptions, show)))
    else:
        _print(before, found, cluster, assumptions, show)
    return 0


def _count(gpus: int | None, nodes: int | None, gpus_per_node: int) -> int:
    from chord_megatron.system.errors import UserError

    if (gpus is None) == (nodes is None):
        raise UserError("say how many GPUs there are: --gpus 64, or --nodes 8 with --gpus-per-node 8")
    count = gpus or (nodes or 0) * gpus_per_node
    if count > _MOST_GPUS:
        lower = "--gpus" if gpus else "--nodes or --gpus-per-node"
        raise UserError(f"{count} GPUs are more than the {_MOST_GPUS} that plan takes; lower {lower}")
    if count > gpus_per_node and count % gpus_per_node:
        raise UserError(f"--gpus {count} is not a multiple of --gpus-per-node {gpus_per_node}; change one of them")
    return count


def _refuse_output(output: Path | None) -> None:
    from chord_megatron.system.errors import UserError

    if output is None:
        return
    if os.path.lexists(output):
        raise UserError(f"--output {output} is there already; name another file, or remove it")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist; make it, or name another file")


def _write(output: Path, config: Config) -> None:
    from chord_megatron.config import Config as AnyConfig
    from chord_megatron.config import to_yaml
    from chord_megatron.system.errors import UserError

    text = to_yaml(AnyConfig.model_validate(config.model_dump()))
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None


def _print(before: Config, found: Search, cluster: Cluster, assumptions: Assumptions, show: int) -> None:
    from rich.console import Console

    from chord_megatron.planning.proposals import changes

    console, best = Console(), found.best
    console.print(_title(before, best, cluster, assumptions), highlight=False)
    for table in (_layouts(found, show), _memory(best), _time(best), _messages(best)):
        console.print(table)
    for line in _left_out(found):
        console.print(line, highlight=False, markup=False)
    changed = changes(before, best.layout.config)
    console.print(f"\n[bold]proposed:[/bold] {best.layout.name}", highlight=False)
    for key, (old, new) in changed.items():
        console.print(f"  {key}: {_yaml(new)}   (was {_yaml(old)})", highlight=False, markup=False)
    console.print("validate also loads the model's tokenizer, and doctor asks the machines themselves", highlight=False)


def _title(before: Config, best: Proposal, cluster: Cluster, assumptions: Assumptions) -> str:
    from chord_megatron.planning.workload import workload

    gpu, load = cluster.gpu, workload(before, best.layout.plan, assumptions.fill)
    nodes = -(-cluster.gpus // cluster.gpus_per_node)
    return (
        f"{before.model.path} on {cluster.gpus} x {gpu.name} ({counted(nodes, 'node')}): {gpu.memory_gb:g} GB, "
        f"{gpu.bf16_tflops:g} TFLOP/s, HBM {gpu.hbm_gb_per_s:g}, NVLink {gpu.nvlink_gb_per_s:g}, network "
        f"{gpu.network_gb_per_s:g} GB/s ({gpu.source})\n"
        f"memory: every row of {load.longest_row} tokens, TransformerEngine's layers; time: rows of "
        f"{load.tokens / load.rows:.0f} tokens, {assumptions.mfu:.0%} of the peak; "
        "computed, not measured"
    )


def _layouts(found: Search, show: int) -> Table:
    names = ["", "layout", "layers", "rows", "GB", "s/step", "rollout", "train", "bubble", "sync"]
    table = _table("Layouts that fit, the fastest first, each in its fastest cut", names)
    shown = _different(found.proposals)[:show]
    for proposal in shown if found.best in shown else [*shown, found.best]:
        time, layout = proposal.step.time, proposal.layout
        train = time.total - time.rollout - time.sync
        cut = "by cost" if layout.config.parallel.pipeline_layout == "auto" else ""
        table.add_row(
            ">" * (proposal is found.best),
            layout.name,
            cut,
            f"{layout.config.train.micro_batch_size}",
            f"{layout.fullest.peak / 1e9:.1f}",
            *(f"{seconds:.1f}" for seconds in (time.total, time.rollout, train)),
            f"{time.bubble / train:.0%}",
            f"{time.sync:.1f}",
        )
    return table


def _different(proposals: Sequence[Proposal]) -> list[Proposal]:
    """The first of those that differ in the cut of their layers alone."""
    first: dict[tuple, Proposal] = {}
    for proposal in proposals:
        config = proposal.layout.config
        parallel = config.parallel
        sizes = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
            parallel.expert_model_parallel_size,
            config.model.recomputes_layers,
        )
        first.setdefault(sizes, proposal)
    return [*first.values()]


def _memory(best: Proposal) -> Table:
    """Of the first stage, the fullest and the last."""
    stages = best.layout.stages
    fullest = max(range(len(stages)), key=lambda stage: stages[stage].peak)
    parts = {name for stage in stages for name, size in stage.parts().items() if size}
    names = [name for name in stages[0].parts() if name in parts]
    table = _table("Memory of a GPU, GB", ["stage", *names, "training", "drawing", "on the host"])
    for number in sorted({0, fullest, len(stages) - 1}):
        stage = stages[number]
        sizes = [stage.parts()[name] for name in names]
        host = stage.state.reference + stage.state.aside
        table.add_row(f"{number}", *(f"{size / 1e9:.1f}" for size in (*sizes, stage.training, stage.generating, host)))
    return table


def _time(best: Proposal) -> Table:
    parts = best.step.time.parts()
    table = _table("Seconds of a step", [*parts, "total"])
    table.add_row(*(f"{seconds:.2f}" for seconds in (*parts.values(), best.step.time.total)))
    return table


def _messages(best: Proposal) -> Table:
    from chord_megatron.planning.traffic import merged

    table = _table("What a GPU sends in a step", ["", "", "MB each", "how many", "over", "s"])
    for message in merged(best.step.messages):
        table.add_row(
            message.parallelism,
            message.what,
            f"{message.nbytes / 1e6:,.1f}",
            f"{message.count:,.0f}",
            message.link,
            f"{message.total_seconds:.2f}",
        )
    return table


def _left_out(found: Search) -> list[str]:
    lines = [f"\n{found.tried} layouts tried, {len(found.proposals)} fit {found.usable / 1e9:.0f} GB"]
    if found.too_large:
        smallest = found.too_large[0]
        lines.append(
            f"{len(found.too_large)} are too large, the smallest of them {smallest.name}: "
            f"{smallest.fullest.peak / 1e9:.1f} GB"
        )
    return lines + [f"{count} refused: {sentence}" for sentence, count in found.refused.most_common(5)]


def _table(title: str, names: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < 2 else "right", overflow="fold")
    return table


def _yaml(value: Any) -> str:
    return json.dumps(value)


def _document(before: Config, found: Search, cluster: Cluster, assumptions: Assumptions, show: int) -> dict[str, Any]:
    from dataclasses import asdict

    from chord_megatron.planning.proposals import changes

    smallest = found.too_large[0] if found.too_large else None
    return {
        "computed": True,
        "cluster": asdict(cluster),
        "assumptions": asdict(assumptions),
        "usable_bytes": found.usable,
        "proposed": _as_json(before, found.best),
        "layouts": [_as_json(before, proposal) for proposal in found.proposals[:show]],
        "fitting": len(found.proposals),
        "too_large": len(found.too_large),
        "smallest_too_large": smallest and {"layout": smallest.name, "bytes": smallest.fullest.peak},
        "refused": dict(found.refused),
        "changes": {key: new for key, (_, new) in changes(before, found.best.layout.config).items()},
    }


def _as_json(before: Config, proposal: Proposal) -> Mapping[str, Any]:
    from dataclasses import asdict

    from chord_megatron.planning.proposals import changes
    from chord_megatron.planning.traffic import merged

    layout, step = proposal.layout, proposal.step
    return {
        "layout": layout.name,
        "settings": {key: new for key, (_, new) in changes(before, layout.config).items()},
        "bytes_by_stage": [
            {**stage.parts(), "training": stage.training, "generating": stage.generating} for stage in layout.stages
        ],
        "seconds": {**step.time.parts(), "total": step.time.total},
        "messages": [asdict(message) for message in merged(step.messages)],
        "model_flops": step.model_flops,
    }
