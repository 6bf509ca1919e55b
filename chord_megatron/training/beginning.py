"""Where a run begins: what its directory holds already, and whether that can be gone on with. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chord_megatron.config import Config
from chord_megatron.planning.plan import Plan
from chord_megatron.planning.resuming import changes
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.training.ending import limits


def finished(config: Config) -> str | None:
    """What to say where the run is finished that is in the directory; None where it is not.

    Raises UserError where that is another run: of other data, or of whatever else a run cannot go on with.
    """
    run_dir = RunDir(Path(config.train.output_dir))
    settings = (config.train.train_iters, limits(config.train))
    if run_dir.ending(*settings) is None:
        return None
    changed = changes(run_dir.settings(), config, run_dir.path)
    since = f" (with other settings than now: {', '.join(changed)})" if changed else ""
    return run_dir.ending(*settings, since=since)


@dataclass(frozen=True)
class Beginning:
    """The checkpoint to go on from."""

    step: int | None  # None: a new run
    changed: list[str]  # of the configuration since: "KEY OLD -> NEW"


def find_beginning(run_dir: RunDir, config: Config, plan: Plan) -> Beginning:
    """Raises UserError where a run of this configuration can neither begin nor go on in its directory."""
    run_dir.refuse_unusable()
    changed = changes(run_dir.settings(), config, run_dir.path) if run_dir.has_begun else []
    step = run_dir.resume_step()
    if step is not None and step % plan.steps_per_rollout:
        raise UserError(
            f"the checkpoint of step {step} lies inside a generation batch of grpo.steps_per_generation x "
            f"num_iterations = {plan.steps_per_rollout} steps, which is not kept; restore what the run had"
        )
    return Beginning(step, changed)
