"""The built-in rewards: which answer of a completion counts, and what equals the reference."""

from __future__ import annotations

import pytest
from math_verify.errors import TimeoutException

from chord_megatron.rewards import build_reward_function, builtin
from chord_megatron.rewards.builtin import accuracy, format_reward, marked_accuracy
from chord_megatron.training.stopping import Stopped


def accuracy_of(completion: str, reference: str) -> float:
    (reward,) = accuracy([""], [completion], [reference])
    return reward


def format_of(completion: str) -> float:
    (reward,) = format_reward([""], [completion], ["1"])
    return reward


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        ("6 * 12 = 72\n#### 72", "72", 1.0),
        ("so \\boxed{72}", "72", 1.0),
        ("The answer is 72.", "72", 1.0),
        ("<think>hm</think><answer>72</answer>", "72", 1.0),
        ("<answer>\\boxed{72}</answer>", "72", 1.0),
        ("#### $1,234.00", "1,234", 1.0),
        ("\\boxed{1234}", "1,234", 1.0),
        ("#### **-3**", "-3", 1.0),
        ("#### 72 apples", "72", 1.0),
        ("#### Step 1\n6 * 12 = 72\nThe answer is 72.", "72", 1.0),
        ("$6 \\cdot 12 = 72$\n#### 72\n\nQuestion: what is 5?", "72", 1.0),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("The answer is $\\frac{1}{2}$.", "\\frac12", 1.0),
        ("\\boxed{\\dfrac{\\sqrt{2}}{2}}", "$\\frac{\\sqrt{2}}{2}$", 1.0),
        ("#### 1/2", "\\boxed{\\frac{1}{2}}", 1.0),
        ("\\boxed{1 + x}", "x+1", 1.0),
        ("\\boxed{\\text{Paris}}", "paris", 1.0),
        ("<answer> (B) </answer>", "B", 1.0),
        (r"\boxed{x \equiv 3 \pmod{5}}", r"x\equiv 3\pmod{5}", 1.0),
        (r"\boxed{\{1,2\}}", r"\{2, 1\}", 1.0),
        (r"\boxed{5\pi\text{ square units}}", r"5\pi", 1.0),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1.0),
        ("#### The total is 72 dollars", "72", 1.0),
        ("#### 73", "72", 0.0),
        (r"\boxed{2x}", "2", 0.0),
        (r"\boxed{4 \text{ or } 5}", "4", 0.0),
        (r"\boxed{[1, 2)}", "[1, 2]", 0.0),
        ("72 is not it, #### 7", "72", 0.0),
        ("\\boxed{72} no, \\boxed{73}", "72", 0.0),
        ("The answer is 73, not 72", "72", 0.0),
        ("#### 172", "72", 0.0),
        ("#### 7.2", "72", 0.0),
        ("#### 72", "-72", 0.0),
        ("#### listen", "silent", 0.0),  # not a product of letters
        ("\\boxed{x - 1}", "x+1", 0.0),
        ("I do not know", "72", 0.0),
        ("", "72", 0.0),
        ("\\boxed{", "72", 0.0),
        ("\\boxed{}", "72", 0.0),
        ("#### ", "72", 0.0),
    ],
)
def test_accuracy(completion, reference, reward):
    assert accuracy_of(completion, reference) == reward


def test_accuracy_survives_a_formula_that_never_ends():
    assert accuracy_of("\\boxed{9^{9^{9^9}}}", "72") == 0.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"first \boxed{1}, then \boxed{\sqrt{\frac{2^{3}}{x_{1}}}}", r"\sqrt{\frac{2^{3}}{x_{1}}}"),
        (r"\boxed{1} \boxed{2^{2^{2^{2}}}}", "65536"),
        (r"\boxed{1}, so \boxed{\text{the set } \{2\}}", r"\text{the set } \{2\}"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),  # as MATH writes some of its boxes, and the next one
        (r"$x = \boxed 5$", "5"),
        (r"\boxed{1} and <answer>2</answer>", "2"),
        (r"<answer>2</answer> and \boxed{1}", "1"),
        (r"<answer>The answer is \boxed{2}.</answer>", "2"),
        ("<think>\n\\boxed{1}</think>\n\n2", "2"),
        ("<think>\n1</think>\n\n<answer>\n2\n</answer>", "2"),
        ("<think>1</think><answer>2</answer>", "2"),
        ("<think>1</think>2", "2"),
        ("#### 2 eggs\n\nQuestion: what is 5 + 5?", "2"),
        ("#### 5\n#### 2 ####", "2"),
        ("##### Step 5\n2", "2"),
        ("#### The answer is 2", "2"),
    ],
)
def test_the_last_answer_counts(completion, answer):
    assert accuracy_of(completion, answer) == 1.0
    assert accuracy_of(completion, "1" if answer != "1" else "2") == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{72} \boxed{73",
        r"\boxed{72} \boxed{\frac{73}{1}",
        "<answer>72</answer> <answer>73",
        r"\boxed{72} \boxed{}",
    ],
)
def test_a_last_answer_that_is_cut_is_none(completion):
    assert accuracy_of(completion, "72") == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "####" * 995,
        "#### " * 995,
        "####\n" * 4000,
        "#" * 4000,
        r"\boxed{" * 4000,
        r"\boxed{" * 4000 + "73" + "}" * 3999,
        "<answer>" * 4000,
        "<answer>#### \\boxed{" * 2000,
        "{" * 20_000,
        "#### " + "9" * 20_000,
        "\\boxed{1e999999999}",
        "\\boxed{10^{999999999}}",
        "\\boxed{\\frac{1}{0}}",
        "\\boxed{" + "\\frac{" * 500 + "}" * 500 + "}",
        "<think>" + "</think><answer>" * 4000,
        "\x00\ud83d",
    ],
)
def test_no_completion_ends_a_run(completion):
    assert accuracy_of(completion, "72") == 0.0
    assert format_of(completion) == 0.0


def test_a_box_of_any_depth_is_read():
    assert accuracy_of("\\boxed{72} \\boxed{" + "{" * 4000 + "73" + "}" * 4000 + "}", "72") == 0.0


@pytest.mark.parametrize(
    "reference",
    [
        "<answer> 3 </answer>",
        "<answer>3</answer>",
        r"\boxed{3}",
        r"$\boxed{3}$",
        "#### 3",
        "He eats 2 of 5 eggs.\nSo <<5-2=3>>3 eggs are left.\n#### 3",
        r"We have $x^2 = 9$ and $x > 0$, so $x = \boxed{3}.$",
        r"At first sight \boxed{4}, but the answer is \boxed{3}, since $x \in \{1, 3\}$.",
    ],
)
@pytest.mark.parametrize("completion", ["#### 3", r"\boxed{3}", "<answer>3</answer>", "The answer is 3.", "3"])
def test_references_are_extracted_like_completions(completion, reference):
    assert accuracy_of(completion, reference) == 1.0
    assert accuracy_of(completion.replace("3", "4"), reference) == 0.0


# What JSON numbers become as text, and numbers that only differ far behind the point.
@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        ("0.00001", "1e-05", 1.0),
        ("10^{-5}", "1e-05", 1.0),
        (r"\frac{1}{100000}", "1e-05", 1.0),
        ("e-5", "1e-05", 0.0),
        ("1e-05", "0.00001", 1.0),
        ("100000000000000000000", "1e+20", 1.0),
        ("100,000,000,000,000,000,000", "1e+20", 1.0),
        ("100000000000000000001", "1e+20", 0.0),
        ("e+20", "1e+20", 0.0),
        ("2e-7", "3e-7", 0.0),
        (r"2 \cdot 10^{-7}", "0.0000003", 0.0),
        (r"2 \cdot 10^{-7}", "0.0000002", 1.0),
        ("1/2^99", "1/2^98", 0.0),
        ("1/2^99", "1/2^99", 1.0),
        (r"\frac{1}{2^{99}}", "1/2^98", 0.0),
        (r"\frac{1}{2^{99}}", r"2^{-99}", 1.0),
        (r"\{2^{-99}, 1\}", r"\{2^{-98}, 1\}", 0.0),
        (r"3 \cdot 2^{-99}", r"\frac{3}{2^{99}}", 1.0),
        ("0.0000002", r"\frac{\sqrt{2}}{5000000}", 0.0),
        ("1234567.1", "1234567.9", 0.0),
        ("10000000000001", "10000000000002", 0.0),
        ("0.3", "0.30000000000000004", 1.0),
        ("3", "2.9999999999999996", 1.0),
        ("0.333333", "1/3", 1.0),
        ("0.33", "1/3", 0.0),
        ("3.1415927", "3.141593", 1.0),
        ("0.707107", r"\frac{\sqrt{2}}{2}", 1.0),
        (r"\frac{1073741823}{1073741824}", "1", 0.0),
    ],
)
def test_numbers_are_compared_at_their_own_scale(answer, reference, reward):
    assert accuracy_of(f"\\boxed{{{answer}}}", reference) == reward
    assert accuracy_of(f"\\boxed{{{reference}}}", answer) == reward
    assert accuracy_of(f"<answer>{answer}</answer>", f"#### {reference}") == reward


def test_numbers_without_a_mark_are_compared_at_their_own_scale():
    assert accuracy_of("The answer is 1e-05.", "0.00001") == 1.0
    assert accuracy_of("The answer is 1e-05.", "1") == 0.0
    assert accuracy_of("The answer is 0.0000002.", "2e-07") == 1.0
    assert accuracy_of("The answer is 0.0000002.", "3e-07") == 0.0
    assert accuracy_of("The answer is 50%.", "50") == accuracy_of("The answer is 50.", "50%") == 1.0
    assert accuracy_of("The answer is 0.5.", r"50\%") == accuracy_of(r"The answer is $50\%$.", "0.5") == 1.0


@pytest.mark.parametrize(
    "completion",
    [r"#### \$18.90", r"\boxed{\$18.90}", "#### 18.90 dollars", r"\boxed{18.90\text{ dollars}}", "#### $18.9"],
)
def test_amounts_of_money(completion):
    assert accuracy_of(completion, "18.90") == accuracy_of(completion, r"\$18.90") == 1.0
    assert accuracy_of(completion, "18") == accuracy_of(completion, "18.91") == 0.0


@pytest.mark.parametrize("completion", ["#### 18 dollars", r"\boxed{18 eggs}", "#### 18 eggs a day\n\nQuestion: 5?"])
def test_numbers_with_words(completion):
    assert accuracy_of(completion, "18") == accuracy_of(completion, "18 eggs") == 1.0
    assert accuracy_of(completion, "81") == 0.0


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a\nb</think>\n<answer>1</answer>", 1.0),
        ("<think></think><answer></answer>\n", 1.0),
        ("<answer>1</answer>", 0.0),
        ("<think>a</think><answer>1", 0.0),
        ("<think>a</think> so <answer>1</answer>", 0.0),
        ("<think>a</think><answer>1</answer> bye", 0.0),
        ("first <think>a</think><answer>1</answer>", 0.0),
        ("<think>\nprefilled by the template</think>\n\n<answer>4</answer>", 1.0),
        ("<think>I write <answer> tags</think><answer>1</answer>", 1.0),
        ("<think>a</think><answer>1</answer><answer>2</answer>", 0.0),
        ("<think>a</think><answer>1</answer>2</answer>", 0.0),
    ],
)
def test_format(completion, reward):
    assert format_of(completion) == reward


@pytest.mark.parametrize(
    "error", [RecursionError("too deep"), MemoryError(), ValueError("4300 digits"), TimeoutException()]
)
def test_what_a_completion_raises_is_its_reward_0_and_counted(error, monkeypatch):
    def raise_for_73(text, *_):
        if "73" in text:
            raise error
        return text

    monkeypatch.setattr(builtin, "final_answer", raise_for_73)
    rewards = build_reward_function(["accuracy", "format"], [1.0, 10.0], timeout_seconds=1)
    completions = ["72", "<think></think><answer>73</answer>", "72"]
    with pytest.warns(RuntimeWarning, match=f"the reward accuracy failed on a completion, .*{type(error).__name__}"):
        result = rewards(["p"] * 3, completions, ["72"] * 3, [{}] * 3)
        assert accuracy([""] * 3, completions, ["72"] * 3) == result.by_function["accuracy"]
    assert result.by_function == {"accuracy": [1.0, 0.0, 1.0], "format": [0.0, 1.0, 0.0]}
    assert result.total == [1.0, 10.0, 1.0]
    assert result.errors == [0, 1, 0]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(1), Stopped(2)])
def test_an_interruption_is_no_reward(interruption, monkeypatch):
    """Ctrl-C comes wherever the run is: it is not a completion on which the reward failed."""

    def interrupted(text, *_):
        raise interruption

    monkeypatch.setattr(builtin, "final_answer", interrupted)
    with pytest.raises(type(interruption)):
        accuracy_of("72", "72")


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        ("101_2", "101_2", 1.0),
        ("101_{2}", "101_2", 1.0),
        ("101", "101_2", 1.0),  # the question has named the base
        ("101_2", "101_3", 0.0),
        ("101_2", "101_{12}", 0.0),
        ("11_2, 101_2", "101_2, 11_2", 1.0),
        ("11_2, 101_3", "101_2, 11_2", 0.0),
        ("a_1", "a_1", 1.0),
    ],
)
def test_numbers_of_another_base_are_others(answer, reference, reward):
    assert accuracy_of(f"\\boxed{{{answer}}}", reference) == reward


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        ("10 AM", "10 a.m.", 1.0),
        ("10", r"10\text{ p.m.}", 1.0),
        ("10 p.m.", r"10 \text{ PM}", 1.0),
        ("10 AM", "10 PM", 0.0),
        (r"10\text{ a.m.}", r"10\text{ p.m.}", 0.0),
    ],
)
def test_ten_in_the_morning_is_not_ten_in_the_evening(answer, reference, reward):
    assert accuracy_of(f"\\boxed{{{answer}}}", reference) == reward


MARKED = {
    "boxed": r"it is \boxed{32}",
    "hash": "it is\n#### 32",
    "tag": "<answer>32</answer>",
}


@pytest.mark.parametrize("answer_format", ["boxed", "hash", "tag", "any"])
def test_an_answer_format_wants_its_mark(answer_format: str):
    completions = [*MARKED.values(), "a1 32 zz", "32"]
    reward = build_reward_function(["accuracy"], None, 60, answer_format=answer_format)
    found = reward([""] * 5, completions, ["#### 32"] * 5, [{}] * 5).total
    wanted = [float(answer_format in (mark, "any")) for mark in MARKED]
    assert found == [*wanted, *[float(answer_format == "any")] * 2]


@pytest.mark.parametrize(
    ("completion", "answer_format", "reward"),
    [
        (r"#### $\boxed{32}$", "hash", 1.0),  # one mark within another
        (r"<answer>\boxed{32}</answer>", "tag", 1.0),
        (r"\boxed{31} then" "\n#### 32", "hash", 1.0),
        ("#### 32\n" r"but \boxed{31}", "hash", 1.0),  # the other mark is no mark
        ("#### 32\n#### 31", "hash", 0.0),
        ("<think>#### 32</think> 32", "hash", 0.0),
        ("####", "hash", 0.0),
        (r"\boxed{32", "boxed", 0.0),
    ],
)
def test_which_mark_counts(completion: str, answer_format: str, reward: float):
    assert marked_accuracy(answer_format, [""], [completion], ["32"]) == [reward]
