"""What follows the step number, as the configuration has it."""

from __future__ import annotations

from chord_megatron.algorithm.mu import mu_schedule
from chord_megatron.algorithm.presets import SEMANTICS
from chord_megatron.config import Config


def mu_at(config: Config, step: int) -> float:
    """mu of the configured schedule at a 0-based optimizer step."""
    chord = config.chord
    return mu_schedule(
        step + SEMANTICS[chord.semantics].first_step,
        peak=chord.chord_mu_peak,
        valley=chord.chord_mu_valley,
        warmup_steps=chord.chord_mu_warmup_steps,
        decay_steps=chord.chord_mu_decay_steps,
    )


def needs_rollouts(config: Config) -> bool:
    """Whether any step of a run draws completions."""
    return SEMANTICS[config.chord.semantics].draws_rollouts_at_1 or mu_range(config)[0] < 1


def mu_range(config: Config) -> tuple[float, float]:
    """The smallest and the largest mu of a run. Between the ends of its parts the schedule rises or falls."""
    chord, train_iters = config.chord, config.train.train_iters
    warmup_steps = chord.chord_mu_warmup_steps
    first = SEMANTICS[chord.semantics].first_step
    borders = (0, warmup_steps - first, warmup_steps + chord.chord_mu_decay_steps - first, train_iters)
    values = [mu_at(config, step) for border in borders for step in (border - 1, border) if 0 <= step < train_iters]
    return min(values), max(values)
