"""What trainers of CHORD do differently (`chord.semantics`). Every other key is free under each of them.

`paper` is arXiv 2508.11408 with exact means over the optimizer step; it is the only one whose loss and gradient do not
depend on the micro-batch size. The others reproduce a trainer's numbers:

- `ms-swift` 4.6.0.dev0 (commit 3602360): `compute_chord_loss` in swift/rlhf_trainers/utils.py, the GRPO loss in
  swift/rlhf_trainers/grpo_trainer.py.
- `trinity`, Trinity-RFT 0.6: trinity/algorithm/policy_loss_fn/chord_policy_loss.py and ppo_policy_loss.py, with
  micro-batches of a fixed number of rows (`use_dynamic_bsz: false`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chord_megatron.algorithm.advantages import EPS

Preset = Literal["paper", "ms-swift", "trinity"]


@dataclass(frozen=True)
class Semantics:
    """A trainer's choices."""

    first_step: int = 0  # what the schedule of mu calls the first update
    # None: means over the step. equal, rows: means of micro-batches, each alike or by its number of rows.
    micro_batches: Literal["equal", "rows"] | None = None
    # Losses whose tokens are counted over the step even so, and whose sum is then divided by the accumulation steps.
    divided_by_accumulation: frozenset[str] = frozenset()
    experts_at_rollout_temperature: bool = False
    draws_experts_at_0: bool = False  # at mu = 0 rows are drawn, the cursor moves, and they weigh nothing
    draws_rollouts_at_1: bool = False
    advantage_eps: float = EPS  # beside the std of rewards


SEMANTICS: dict[Preset, Semantics] = {
    "paper": Semantics(),
    "ms-swift": Semantics(
        micro_batches="equal",
        divided_by_accumulation=frozenset({"dapo", "cispo"}),
        draws_rollouts_at_1=True,
        advantage_eps=1e-4,
    ),
    "trinity": Semantics(
        first_step=1,
        micro_batches="rows",
        experts_at_rollout_temperature=True,
        draws_experts_at_0=True,
        draws_rollouts_at_1=True,
    ),
}
