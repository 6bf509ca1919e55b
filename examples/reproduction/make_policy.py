"""Train the policy: a small model that solves SKILL of the validation prompts, in its own notation.

    python examples/reproduction/make_policy.py runs/reproduction/model

policy.yaml trains it from random weights, for longer than is wanted; the first of its checkpoints that is able enough
is the one, so that another machine's rounding does not move where the comparison begins.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from commands import chord_megatron

from chord_megatron.config import load_config
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.summary import eval_points, load_history

RECIPE = Path(__file__).with_name("policy.yaml")
SKILL = 0.4


def main() -> None:
    """Train, choose, copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the model goes")
    directory = parser.parse_args().directory
    chord_megatron("train", RECIPE, "--nproc-per-node", "2")
    run = Path(load_config(str(RECIPE), []).train.output_dir)
    able = [point.step for point in eval_points(load_history(run)) if point.reward >= SKILL]
    if not able:
        raise UserError(f"the policy in {run} never solved {SKILL:.0%} of its validation prompts")
    shutil.copytree(run / "hf" / f"step_{able[0]}", directory)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
