"""`chord-megatron validate`: what a configuration asks for, in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chord_megatron.cli.options import ConfigFile, Nodes, Overrides, ProcessesPerNode, validated

if TYPE_CHECKING:
    from rich.table import Table

    from chord_megatron.config import Config
    from chord_megatron.planning.plan import Plan
    from chord_megatron.weights.architecture import ModelArchitecture


def validate(
    config: ConfigFile, overrides: Overrides = None, nproc_per_node: ProcessesPerNode = 1, nnodes: Nodes = 1
) -> int:
    """Check a configuration; print its batch arithmetic and parallel layout. Of the model it loads the tokenizer.

    Of train.output_dir it says what would keep the run from beginning there, and writes nothing.
    """
    from rich.console import Console

    from chord_megatron.data.tokenizer import load_tokenizer
    from chord_megatron.data.vocabulary import check_vocabulary
    from chord_megatron.tracking.run_dir import RunDir
    from chord_megatron.tracking.run_lock import refuse_used
    from chord_megatron.tracking.trackers.opening import refuse_missing_packages
    from chord_megatron.training.beginning import find_beginning
    from chord_megatron.weights.hf_config import read_architecture

    resolved, plan = validated(config, overrides, nproc_per_node * nnodes)
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
    Console().print(_plan_table(resolved, plan, arch))
    return 0


def _plan_table(config: Config, plan: Plan, arch: ModelArchitecture) -> Table:
    from rich.table import Table

    from chord_megatron.planning.presets import cost_of_preset

    parallel, train = config.parallel, config.train
    table = Table(show_header=False, title="What one optimizer step does", title_justify="left")
    for name, value in (
        ("prompts", f"{plan.prompts_per_step}"),
        (
            "completions",
            f"{plan.completions_per_step} = {plan.prompts_per_step} prompts x {config.rollout.num_generations}",
        ),
        ("expert rows", f"{plan.expert_rows_per_step}"),
        ("micro-batches", _micro_batches(config, plan)),
        ("rollouts", f"{config.rollout.engine}, new ones every {plan.steps_per_rollout} step(s)"),
        (
            "layout",
            f"{plan.world_size} processes = TP {parallel.tensor_model_parallel_size}"
            f" x PP {parallel.pipeline_model_parallel_size}"
            + f" x CP {parallel.context_parallel_size}" * (parallel.context_parallel_size > 1)
            + f" x DP {plan.data_parallel_size}"
            + (
                f", VPP {parallel.virtual_pipeline_model_parallel_size}"
                * bool(parallel.virtual_pipeline_model_parallel_size)
            )
            + ", sequence parallel" * parallel.sequence_parallel
            + ", distributed optimizer" * config.optimizer.use_distributed_optimizer,
        ),
        *_memory(config, plan, arch),
        *([("layers", _layers(config, arch))] if parallel.pipeline_model_parallel_size > 1 else []),
        ("mu", _mu(config)),
        ("semantics", ": ".join(filter(None, (config.chord.semantics, cost_of_preset(config))))),
        ("steps", f"{train.train_iters}, into {train.output_dir}"),
    ):
        table.add_row(name, value)
    return table


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
        return f"as many per data-parallel rank as the lengths need, of up to {budget} tokens"
    size = config.train.micro_batch_size
    return f"{plan.micro_batches_per_step} per data-parallel rank, of up to {size} packed sequences"


def _layers(config: Config, arch: ModelArchitecture) -> str:
    from itertools import groupby

    from chord_megatron.planning.pipeline import is_cut_by_cost, stage_layers

    runs = [(layers, len([*run])) for layers, run in groupby(stage_layers(config.parallel, arch))]
    cut = " + ".join(f"{count} x {layers}" if count > 1 else f"{layers}" for layers, count in runs)
    by_cost = ", by what they cost" if is_cut_by_cost(config.parallel, arch) else ""
    return f"{arch.num_layers} = {cut}, in the order of the stages{by_cost}"


def _mu(config: Config) -> str:
    from chord_megatron.planning.schedule import CLOSED_LOOPS, mu_at, mu_range

    chord, last = config.chord, config.train.train_iters - 1
    start = f"{mu_at(config, 0):.3g} at step 0"
    if chord.mu_schedule not in CLOSED_LOOPS:
        return f"{start}, {mu_at(config, last):.3g} at step {last}"
    lowest, highest = mu_range(config)
    return f"{start}, then within {lowest:.3g} and {highest:.3g}, by {chord.mu_schedule} towards {chord.mu_target:g}"
