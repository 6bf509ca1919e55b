"""The batch arithmetic and the parallel layout of a run, and every rule that spans several fields.

`make_plan` looks at numbers only and loads nothing, so that mistakes show before any process starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from chord_megatron.config import Config
from chord_megatron.planning.batches import check_batches, check_lengths, check_steps, expert_max_length
from chord_megatron.planning.evaluations import check_evaluations
from chord_megatron.planning.experts import check_expert_weight
from chord_megatron.planning.layout import check_layout
from chord_megatron.planning.megatron import check_megatron
from chord_megatron.planning.objectives import check_objective
from chord_megatron.planning.optimizer import check_optimizer
from chord_megatron.planning.presets import check_preset
from chord_megatron.planning.recomputation import check_recomputation
from chord_megatron.planning.rewards import check_rewards
from chord_megatron.planning.rollouts import check_rollouts
from chord_megatron.planning.schedule import check_mu_schedule, needs_rollouts
from chord_megatron.planning.secrets import check_secrets
from chord_megatron.planning.streams import check_streams
from chord_megatron.weights.architecture import ModelArchitecture


@dataclass(frozen=True)
class Plan:
    """What one optimizer step consists of."""

    world_size: int
    data_parallel_size: int
    prompts_per_step: int
    completions_per_step: int  # 0 where none is drawn in the whole run
    expert_rows_per_step: int  # while mu > 0
    micro_batches_per_step: int  # on each data-parallel rank, while both streams run
    expert_max_length: int  # tokens of prompt and answer; longer rows are left out
    steps_per_rollout: int  # optimizer steps that share one generation batch; 1 = on-policy


def make_plan(config: Config, arch: ModelArchitecture, world_size: int) -> Plan:
    """Check the configuration against the model and the number of processes. Raises UserError."""
    check_secrets(config)
    data_parallel_size = check_layout(config, arch, world_size)
    check_recomputation(config.model, arch)
    check_megatron(config)
    check_optimizer(config)
    check_batches(config, data_parallel_size)
    check_mu_schedule(config)
    check_streams(config)
    check_evaluations(config)
    check_rewards(config)
    check_expert_weight(config.chord)
    check_objective(config.grpo)
    check_rollouts(config, arch, world_size)
    check_lengths(config, arch)
    steps_per_rollout = config.grpo.steps_per_generation * config.grpo.num_iterations
    check_steps(config, steps_per_rollout)
    train, num_generations = config.train, config.rollout.num_generations
    completions = (train.global_batch_size or 0) if needs_rollouts(config) else 0
    expert_rows = _expert_rows(config, data_parallel_size)
    check_preset(config, expert_rows)
    rows_per_rank = -(-(completions + expert_rows) // data_parallel_size)
    # The interleaved schedule runs micro-batches in groups of the pipeline size.
    interleaved = config.parallel.virtual_pipeline_model_parallel_size is not None
    multiple = config.parallel.pipeline_model_parallel_size if interleaved else 1
    micro_batches = -(-rows_per_rank // (train.micro_batch_size * multiple)) * multiple
    return Plan(
        world_size=world_size,
        data_parallel_size=data_parallel_size,
        prompts_per_step=completions // num_generations,
        completions_per_step=completions,
        expert_rows_per_step=expert_rows,
        micro_batches_per_step=micro_batches,
        expert_max_length=expert_max_length(config, arch),
        steps_per_rollout=steps_per_rollout,
    )


def _expert_rows(config: Config, data_parallel_size: int) -> int:
    """Expert rows of one optimizer step; per device as in ms-swift: rows x DP x gradient accumulation steps."""
    chord, train = config.chord, config.train
    if chord.chord_sft_per_device_train_batch_size is not None:
        assert train.global_batch_size is not None  # check_batches
        accumulation_steps = train.global_batch_size // (train.micro_batch_size * data_parallel_size)
        return chord.chord_sft_per_device_train_batch_size * data_parallel_size * accumulation_steps
    return chord.chord_sft_global_batch_size or 0
