"""The rewards of the shipped recipes, on rows in the form of their data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from chord_megatron.config import load_config
from chord_megatron.data.columns import read_text
from chord_megatron.data.prompts import reference_finder
from chord_megatron.rewards.builtin import marked_accuracy

EXAMPLES = Path(__file__).parents[2] / "examples"

TWO_BOXES = r"At first \boxed{4} looks right. But $x = \boxed{5}$, since $x \in \{1, 4\}$ is not. Not $\{4\}$."
DEEP = r"So the sum is \[\boxed{\frac{\sqrt{\frac{3}{2}}}{2}}.\] We used $\{1\}$."
NO_BOX = "The output of the program is 12."
SOLUTIONS = {
    "ms_swift_chord/chord_8gpu.yaml": [
        (TWO_BOXES, r"it is \boxed{5}", 1.0),
        (TWO_BOXES, r"it is \boxed{4}", 0.0),
        (DEEP, r"\boxed{\frac{\sqrt{3/2}}{2}}", 1.0),
        (DEEP, r"\boxed{\frac{\sqrt{3/2}}{3}}", 0.0),
        (NO_BOX, r"\boxed{12}", 1.0),  # a row without a box is read as a completion without one
        (NO_BOX, r"\boxed{13}", 0.0),
    ],
    "gsm8k/gsm8k.yaml": [
        ("He pays <<2*9=18>>$18.\n#### 18", "#### $18", 1.0),
        ("He pays <<2*9=18>>$18.\n#### 18", r"#### \boxed{18 dollars}", 1.0),
        ("He pays <<2*9=18>>$18.\n#### 18", r"\boxed{18 dollars}", 0.0),  # not what its system prompt demands
        ("Toula paid 32.\n#### 32", "zx 32 q", 0.0),  # noise
        ("He pays <<2*900=1800>>$1800.\n#### 1,800", "#### 1800", 1.0),
        ("He pays <<2*9=18>>$18.\n#### 18", "#### 9", 0.0),
    ],
    "quickstart/quickstart.yaml": [("932", "750=12 481=13 351=9 #### 932", 1.0), ("932", "#### 32", 0.0)],
}


@pytest.mark.parametrize(
    ("recipe", "solution", "completion", "reward"),
    [(recipe, *case) for recipe, cases in SOLUTIONS.items() for case in cases],
)
def test_the_rewards_of_a_recipe(recipe, solution, completion, reward):
    config = load_config(EXAMPLES / recipe)
    data = config.data
    text = read_text({data.reference_column: solution}, data.reference_column)
    reference = reference_finder(data.reference_pattern)(text)
    assert marked_accuracy(config.rewards.answer_format, [""], [completion], [reference]) == [reward]
