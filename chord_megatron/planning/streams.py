"""Rules of the two streams: what each of them reads."""

from __future__ import annotations

from pathlib import Path

from chord_megatron.config import Config
from chord_megatron.planning.schedule import mu_range, needs_rollouts
from chord_megatron.system.errors import UserError


def check_streams(config: Config) -> None:
    """That each stream has what it reads, and keys that go together come together."""
    chord, rollout, train = config.chord, config.rollout, config.train
    smallest_mu, largest_mu = mu_range(config)
    learns_from_experts = largest_mu > 0
    if learns_from_experts and chord.chord_sft_dataset is None:
        raise UserError(
            "chord.chord_sft_dataset is required while mu > 0; "
            "for GRPO alone set chord.chord_mu_peak=0 and chord.chord_mu_valley=0"
        )
    if needs_rollouts(config) and config.data.dataset is None:
        if smallest_mu == 1:
            raise UserError(
                f"data.dataset is required under chord.semantics={chord.semantics}, which draws rollouts at mu = 1, "
                "too; set it, or chord.semantics=paper"
            )
        raise UserError(
            "data.dataset is required while mu < 1; for supervised training alone set chord.chord_mu_peak=1 and "
            "chord.chord_mu_valley=1"
        )
    if smallest_mu < 1 and rollout.num_generations == 1:
        raise UserError(
            "rollout.num_generations=1 gives every completion the advantage 0, so that nothing is learnt from "
            "rollouts; set it to 2 or more, or for supervised training alone chord.chord_mu_peak=1 and "
            "chord.chord_mu_valley=1"
        )
    sizes = (chord.chord_sft_global_batch_size, chord.chord_sft_per_device_train_batch_size)
    if learns_from_experts and sum(size is not None for size in sizes) != 1:
        raise UserError(
            "set exactly one of chord.chord_sft_global_batch_size and chord.chord_sft_per_device_train_batch_size"
        )
    is_replay = rollout.engine == "replay"
    if is_replay != (rollout.replay_from is not None):
        raise UserError("rollout.engine=replay and rollout.replay_from go together; set both or neither")
    if (
        rollout.record_to
        and rollout.replay_from
        and Path(rollout.record_to).resolve() == Path(rollout.replay_from).resolve()
    ):
        raise UserError("rollout.record_to and rollout.replay_from name one file; record into another one")
    if train.eval_steps is not None and config.data.eval_dataset is None:
        raise UserError("train.eval_steps needs data.eval_dataset; set it, or train.eval_steps=null for no evaluation")
