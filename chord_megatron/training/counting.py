"""The steps of a run of epochs, counted with the data that was read."""

from __future__ import annotations

from chord_megatron.config import Config
from chord_megatron.data.load import RunData
from chord_megatron.planning.plan import Plan
from chord_megatron.planning.steps import counted


def counted_in(data: RunData, config: Config, plan: Plan) -> tuple[Config, list[str]]:
    """The configuration with its steps, and the line that says how they were counted, where they were."""
    config, line = counted(
        config, prompts=len(data.prompts), experts=len(data.experts), expert_rows_per_step=plan.expert_rows_per_step
    )
    return config, [line] if line else []
