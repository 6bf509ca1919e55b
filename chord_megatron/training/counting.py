"""The steps of a run of epochs, counted with the data."""

from __future__ import annotations

from typing import Any

from chord_megatron.config import Config
from chord_megatron.data.load import RunData, load_run_data
from chord_megatron.planning.plan import Plan
from chord_megatron.planning.schedule import needs_rollouts
from chord_megatron.planning.steps import in_steps, is_counted


def counted_in(data: RunData, config: Config, plan: Plan) -> tuple[Config, list[str]]:
    """The configuration with its steps, and the line that says how they were counted, where they were."""
    config, line = in_steps(
        config, prompts=len(data.prompts), experts=len(data.experts), expert_rows_per_step=plan.expert_rows_per_step
    )
    return config, [line] if line else []


def count(config: Config, plan: Plan, tokenizer: Any) -> tuple[Config, list[str]]:
    """The same before a run, of whose data only the rows that count are read. Raises UserError."""
    if is_counted(config):
        return counted_in(RunData((), (), (), frozenset(), ()), config, plan)
    if needs_rollouts(config):
        data = config.data.model_copy(update={"eval_dataset": None})
        chord = config.chord.model_copy(update={"chord_sft_dataset": None})
    else:
        data = config.data.model_copy(update={"eval_dataset": None, "dataset": None})
        chord = config.chord
    return counted_in(load_run_data(data, chord, tokenizer, expert_max_length=plan.expert_max_length), config, plan)
