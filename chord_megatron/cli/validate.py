"""`chord-megatron validate`: what a configuration asks for, in numbers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from chord_megatron.cli.options import ConfigFile, Nodes, Overrides, PrintJson, ProcessesPerNode, validated
from chord_megatron.system.sentences import counted

if TYPE_CHECKING:
    from chord_megatron.config import Config
    from chord_megatron.planning.plan import Plan
    from chord_megatron.weights.architecture import ModelArchitecture


def validate(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc_per_node: ProcessesPerNode = 1,
    nnodes: Nodes = 1,
    print_json: PrintJson = False,
) -> int:
    """Check a configuration; print its batch arithmetic and parallel layout. Of the model it reads
    config.json and tokenizer; of the data, only the rows by which a run of epochs is counted in steps.

    Of train.output_dir it says what would keep the run from beginning there, and writes nothing.
    """
    from chord_megatron.data.tokenizer import load_tokenizer
    from chord_megatron.data.vocabulary import check_vocabulary
    from chord_megatron.planning.plan import make_plan
    from chord_megatron.tracking.run_dir import RunDir
    from chord_megatron.tracking.run_lock import refuse_used
    from chord_megatron.tracking.trackers.opening import refuse_missing_packages
    from chord_megatron.training.beginning import find_beginning
    from chord_megatron.training.counting import count
    from chord_megatron.weights.hf_config import read_architecture

    resolved, plan = validated(config, overrides, nproc_per_node * nnodes, loads_weights=False)
    run_dir = RunDir(Path(resolved.train.output_dir))
    run_dir.refuse_unusable()
    refuse_missing_packages(resolved.tracking.report_to)
    if nnodes == 1:  # a node that comes back to a run of several finds it in use, by that run
        refuse_used(run_dir.path)
    find_beginning(run_dir, resolved, plan)
    model_dir = Path(resolved.model.path)
    tokenizer = load_tokenizer(model_dir, trust_remote_code=resolved.model.trust_remote_code)
    arch = read_architecture(model_dir)
    check_vocabulary(resolved, tokenizer, arch.vocab_size)
    resolved, length = count(resolved, plan, tokenizer)
    plan = make_plan(resolved, arch, plan.world_size)
    _print(resolved, plan, dict(_rows(resolved, plan, arch, *length)), as_json=print_json)
    return 0


def _print(config: Config, plan: Plan, rows: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        document = {"plan": asdict(plan), "summary": rows, "config": config.model_dump()}
        print(json.dumps(document, indent=2, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title="What one optimizer step does", title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _rows(config: Config, plan: Plan, arch: ModelArchitecture, length: str = "") -> list[tuple[str, str]]:
    """Name and text of what is said; nothing of a stream that the run has not."""
    from chord_megatron.planning.presets import cost_of_preset
    from chord_megatron.planning.schedule import needs_rollouts
    from chord_megatron.planning.workload import reads_experts

    return [
        *(_rollouts(config, plan) if needs_rollouts(config) else []),
        *([("expert rows", f"{plan.expert_rows_per_step}")] if reads_experts(config) else []),
        ("micro-batches", _micro_batches(config, plan)),
        ("layout", _layout(config, plan)),
        *_memory(config, plan, arch),
        *([("layers", _layers(config, arch))] if config.parallel.pipeline_model_parallel_size > 1 else []),
        ("mu", _mu(config)),
        ("semantics", ": ".join(filter(None, (config.chord.semantics, cost_of_preset(config))))),
        ("steps", f"{length or config.train.train_iters}, into {config.train.output_dir}"),
    ]


def _rollouts(config: Config, plan: Plan) -> list[tuple[str, str]]:
    generations, steps = config.rollout.num_generations, plan.steps_per_rollout
    often = "at every step" if steps == 1 else f"every {steps} steps"
    groups = f"{counted(plan.prompts_per_step, 'prompt')} x {counted(generations, 'completion')}"
    return [
        ("prompts", f"{plan.prompts_per_step}"),
        ("completions", f"{plan.completions_per_step} = {groups}"),
        ("rollouts", f"{config.rollout.engine}, new ones {often}"),
    ]


def _layout(config: Config, plan: Plan) -> str:
    parallel = config.parallel
    sizes = [("TP", parallel.tensor_model_parallel_size), ("PP", parallel.pipeline_model_parallel_size)]
    sizes += [("CP", parallel.context_parallel_size)] * (parallel.context_parallel_size > 1)
    sizes += [("DP", plan.data_parallel_size)]
    layout = f"{counted(plan.world_size, 'process', 'processes')} = " + " x ".join(f"{n} {size}" for n, size in sizes)
    if parallel.virtual_pipeline_model_parallel_size:
        layout += f", VPP {parallel.virtual_pipeline_model_parallel_size}"
    layout += ", sequence parallel" * parallel.sequence_parallel
    return layout + ", distributed optimizer" * config.optimizer.use_distributed_optimizer


def _memory(config: Config, plan: Plan, arch: ModelArchitecture) -> list[tuple[str, str]]:
    """Of the fullest process, computed."""
    from chord_megatron.planning.activations import layers_here
    from chord_megatron.planning.rank_memory import fullest_rank

    layers = layers_here()
    memory = fullest_rank(config, arch, plan, layers=layers)
    modules = {"local": "Megatron-Core's own modules", "transformer_engine": "TransformerEngine's modules"}[layers]
    beside = ", beside vLLM's share of the GPU" * (config.rollout.vllm_mode == "colocate")
    return [("memory", memory.state_in_words), ("longest rows", f"{memory.step_in_words}{beside} ({modules})")]


def _micro_batches(config: Config, plan: Plan) -> str:
    budget = config.train.max_tokens_per_micro_batch
    if budget is not None:
        return f"as many on each data-parallel rank as the lengths need, of up to {budget} tokens"
    size = counted(config.train.micro_batch_size, "packed sequence")
    return f"{plan.micro_batches_per_step} on each data-parallel rank, of up to {size}"


def _layers(config: Config, arch: ModelArchitecture) -> str:
    from itertools import groupby

    from chord_megatron.planning.pipeline import is_cut_by_cost, stage_layers

    runs = [(layers, len([*run])) for layers, run in groupby(stage_layers(config.parallel, arch))]
    cut = " + ".join(f"{count} x {layers}" if count > 1 else f"{layers}" for layers, count in runs)
    by_cost = ", by what they cost" if is_cut_by_cost(config.parallel, arch) else ""
    return f"{arch.num_layers} = {cut}, in the order of the stages{by_cost}"


def _mu(config: Config) -> str:
    from chord_megatron.planning.schedule import CLOSED_LOOPS, is_valley_throughout, mu_at, mu_range

    chord, last = config.chord, config.train.train_iters - 1
    if is_valley_throughout(chord):
        return f"{chord.chord_mu_valley:.3g} throughout, the valley: without warm-up and decay the peak is not read"
    start = f"{mu_at(config, 0):.3g} at step 0"
    if chord.mu_schedule not in CLOSED_LOOPS:
        return f"{start}, {mu_at(config, last):.3g} at step {last}"
    lowest, highest = mu_range(config)
    return f"{start}, then within {lowest:.3g} and {highest:.3g}, by {chord.mu_schedule} towards {chord.mu_target:g}"
