"""What completions vote for: equal answers have one form, and formats decide what is an answer."""

from __future__ import annotations

import pytest

from chord_megatron.rewards.votes import vote


@pytest.mark.parametrize(
    ("completions", "answer"),
    [
        (["#### 72", r"\boxed{72.0}", "so\n#### $72", "The answer is 72.", "<answer>72</answer>", "72"], "72"),
        ([r"\boxed{\frac{1}{2}}", "#### 0.5", "#### 1/2"], "1/2"),
        ([r"\boxed{\text{Paris}}", "<answer>paris</answer>"], "paris"),
        ([r"\boxed{\frac{\sqrt{2}}{2}}", r"\boxed{\frac{\sqrt2}{2}}"], "sqrt(2)/2"),
        (["<think>#### 1</think>#### 2"], "2"),
        (["", "I do not know", r"\boxed{}"], None),
    ],
)
def test_equal_answers_are_one_vote(completions: list[str], answer: str | None):
    assert [vote(completion) for completion in completions] == [answer] * len(completions)


def test_a_format_decides_what_is_an_answer():
    assert [vote("so 72", kind) for kind in ("any", "hash", "boxed", "tag")] == ["72", None, None, None]
    text = r"\boxed{1} <answer>2</answer>" + "\n#### 3"
    assert [vote(text, kind) for kind in ("any", "hash", "boxed", "tag")] == ["3", "3", "1", "2"]
