"""Where a run ends before train.train_iters: what it goes by, and what is said of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from chord_megatron.config import TrainConfig
from chord_megatron.tracking.best import best_step, evaluations_since_best


class EarlyEnd(NamedTuple):
    """What has ended a run."""

    key: str  # of train
    limit: int  # its value
    reason: str


def limits(train: TrainConfig) -> dict[str, int]:
    """The keys that may end a run early, those that are set."""
    values = {key: getattr(train, key) for key in ("early_stopping_patience", "max_loss_tokens")}
    return {key: value for key, value in values.items() if value is not None}


def early_end(train: TrainConfig, step: int, rewards: Mapping[int, float], loss_tokens: int) -> EarlyEnd | None:
    """What ends a run before this step; None where it goes on, or has taken all its steps.

    rewards: of its evaluations, by step. loss_tokens: that have had a loss so far.
    """
    if step == train.train_iters:
        return None
    budget, patience, best = train.max_loss_tokens, train.early_stopping_patience, best_step(rewards, rewards)
    if budget is not None and loss_tokens >= budget:
        reason = f"stopped early at step {step}: {loss_tokens:,} tokens had a loss, of {budget:,} allowed"
        return EarlyEnd("max_loss_tokens", budget, reason)
    if patience is not None and best is not None and (count := evaluations_since_best(rewards)) >= patience:
        which = "the last evaluation was" if count == 1 else f"{count} evaluations in a row were"
        said = f"{which} not above the eval_reward_mean of step {best}, {rewards[best]:.4g}"
        return EarlyEnd("early_stopping_patience", patience, f"stopped early at step {step}: {said}")
    return None
