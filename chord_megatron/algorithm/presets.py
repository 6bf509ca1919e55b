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
from chord_megatron.algorithm.importance import SequenceRatio

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
    delta: float | None = None  # of the clipped loss, where grpo.delta is null
    log_ratio_bound: float | None = None  # log(pi / pi_old) is kept within +-this
    kl_bound: float | None = None  # the KL penalty of a token is kept within +-this, and has no gradient beyond
    weighs_kl: bool = False  # by the importance weights, like the policy loss
    sequence_ratio: SequenceRatio = "mean"  # of importance weights
    counts_filtered: bool = False  # filtered completions count in the denominators, where grpo.filtered_count is null


SEMANTICS: dict[Preset, Semantics] = {
    "paper": Semantics(),
    "ms-swift": Semantics(
        micro_batches="equal",
        divided_by_accumulation=frozenset({"dapo", "cispo"}),
        draws_rollouts_at_1=True,
        advantage_eps=1e-4,
        kl_bound=10.0,
        weighs_kl=True,
        counts_filtered=True,
    ),
    "trinity": Semantics(
        first_step=1,
        micro_batches="rows",
        experts_at_rollout_temperature=True,
        draws_experts_at_0=True,
        draws_rollouts_at_1=True,
        delta=3.0,
        log_ratio_bound=20.0,
        sequence_ratio="product",
    ),
}
