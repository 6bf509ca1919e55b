"""Which part of a text is its final answer: properties that hold for every text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chord_megatron.rewards.answers import final_answer

deterministic = settings(derandomize=True, deadline=None, max_examples=300)

words = st.text(st.characters(exclude_characters="\\{}#<>", exclude_categories=["Cs"]), max_size=20)
# What may stand in a box: braces that pair, to any depth, and escaped ones that need not.
contents = st.recursive(
    st.one_of(words, st.sampled_from([r"\{", r"\}", r"\\", r"\frac", r"\sqrt", "^", "_"])),
    lambda inner: st.lists(st.one_of(inner, inner.map("{{{}}}".format)), max_size=4).map("".join),
    max_leaves=30,
)
lines = st.text(st.characters(exclude_characters="\\{}#<>\n\r", exclude_categories=["Cs"]), min_size=1, max_size=20)
marked = st.one_of(
    contents.map(lambda inner: (rf"\boxed{{{inner}}}", inner.strip())),
    contents.map(lambda inner: (rf"\fbox {{{inner}}}", inner.strip())),
    words.map(lambda inner: (f"<answer>{inner}</answer>", inner.strip())),
    contents.map(lambda inner: (rf"<answer>\boxed{{{inner}}} it is</answer>", inner.strip())),
    st.integers().map(lambda inner: (f"\n#### {inner}\n", str(inner))),
)


@deterministic
@given(st.lists(st.one_of(words, marked.map(lambda pair: pair[0])), max_size=5).map(" ".join), marked, words)
def test_the_last_mark_decides(before, mark, after):
    text, answer = mark
    assert final_answer(f"{before} {text} {after}") == answer


@deterministic
@given(st.lists(marked.map(lambda pair: pair[0]), max_size=3).map(" ".join), contents)
def test_a_last_mark_that_does_not_end_holds_nothing(before, inner):
    assert final_answer(rf"{before} \boxed{{{inner}") == ""
    assert final_answer(rf"{before} \boxed{{{{{inner}}}") == ""


@deterministic
@given(lines.filter(lambda line: line.strip()))
def test_the_last_line_may_hold_words(line):
    assert final_answer(f"#### 1\nso\n#### {line}") == line.strip()


@deterministic
@given(words)
def test_a_text_without_a_mark_has_no_answer(text):
    assert final_answer(text) is None


pieces = st.sampled_from(
    ["\\boxed", "\\boxed{", "\\fbox{", "<answer>", "</answer>", "####", "eggs", *"{}\\# \n5-x\x00\ud83d"]
)


@settings(derandomize=True, deadline=None, max_examples=1000)
@given(st.lists(pieces, max_size=60).map("".join))
def test_an_answer_is_a_part_of_the_text(text):
    answer = final_answer(text)
    assert answer is None or (answer in text and answer == answer.strip())


@pytest.mark.parametrize(
    "piece", ["####", "#### ", "####\n", "#### 5\n", "\\boxed{", "{", "\\", "<answer>", "</answer>"]
)
def test_a_long_text_is_read_in_one_pass(piece):
    """A quadratic search would need minutes for these."""
    assert final_answer(piece * 200_000) in (None, "", "5")
