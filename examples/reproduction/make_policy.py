"""The policy: a small model that solves some of the validation prompts, in its own notation.

    python examples/reproduction/make_policy.py DIRECTORY          # the one of the committed result, if it is there
    python examples/reproduction/make_policy.py DIRECTORY --train

policy.yaml trains it from random weights, for longer than is wanted; the first of its checkpoints that solves SKILL is
the policy. It learns quickly there, so that one trained on another machine may begin somewhat elsewhere.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from commands import run_chord_megatron

from chord_megatron.config import load_config
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.summary import eval_points, load_history

RECIPE, COMMITTED = Path(__file__).with_name("policy.yaml"), Path("docs/evidence/reproduction/policy")
SKILL = 0.4


def main() -> None:
    """Copy, or train and choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the model goes")
    parser.add_argument("--train", action="store_true", help="train it anew")
    arguments = parser.parse_args()
    source = COMMITTED if COMMITTED.exists() and not arguments.train else trained()
    shutil.copytree(source, arguments.directory)


def trained() -> Path:
    """The first checkpoint of policy.yaml's run that is able enough."""
    run_chord_megatron("train", RECIPE, "--nproc-per-node", "2")
    run = Path(load_config(str(RECIPE), []).train.output_dir)
    able = [point.step for point in eval_points(load_history(run)) if point.reward >= SKILL]
    if not able:
        raise UserError(f"the policy in {run} never solved {SKILL:.0%} of its validation prompts")
    return run / "hf" / f"step_{able[0]}"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
