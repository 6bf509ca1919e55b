"""What a completion votes for, where the completions of a prompt are counted by their answers."""

from __future__ import annotations

from chord_megatron.rewards.answers import AnswerFormat, final_answer, without_thoughts
from chord_megatron.rewards.formulas import plain_words, read_formula, read_sentences
from chord_megatron.rewards.numbers import read_number
from chord_megatron.system.errors import INTERRUPTIONS


def vote(completion: str, answer_format: AnswerFormat = "any") -> str | None:
    """The answer in a plain form, the same for `72`, `72.0` and `$72`; None where there is none to read.

    It is what `accuracy` compares with the reference. What math-verify cannot read in its time is no answer.
    """
    text = without_thoughts(completion)
    marked = final_answer(text, answer_format)
    if marked is None and answer_format != "any":
        return None
    answer = (text if marked is None else marked).strip()
    number = read_number(answer)
    if number is not None:
        return f"{number.value}{number.half}"
    try:
        formula = read_sentences(answer) if marked is None else read_formula(answer)
    except INTERRUPTIONS:
        raise
    except BaseException:  # math-verify's own timeout is no Exception
        return None
    if formula:
        found = str(formula[0])
        number = read_number(found)
        return found if number is None else str(number.value)
    return None if marked is None else plain_words(answer) or None
