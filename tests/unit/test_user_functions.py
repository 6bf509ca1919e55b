"""Functions of the user's own, which run in the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from chord_megatron.system.errors import UserError
from chord_megatron.system.user_functions import is_user_function, load_user_function

KEY = "grpo.policy_loss"


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("mine.py:loss", True), ("a/b c.py:loss", True), ("grpo", False), ("mine.py", False), ("mine.py:1", False)],
)
def test_which_names_are_of_functions(name: str, is_one: bool):
    assert is_user_function(name) == is_one


def test_a_function_is_loaded(tmp_path: Path):
    (tmp_path / "mine.py").write_text("FACTOR = 2\ndef double(value): return FACTOR * value\n")
    assert load_user_function(KEY, f"{tmp_path}/mine.py:double", arguments=1)(21) == 42


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (None, r"mine.py:loss: .*/mine.py does not exist; mend grpo.policy_loss"),
        ("pass\n1 / 0", r"mine.py:loss cannot be loaded: ZeroDivisionError: division by zero \(.*/mine.py:2\)$"),
        ("import sys\nsys.exit(0)", r"mine.py:loss cannot be loaded: SystemExit: 0 \(.*/mine.py:2\)$"),
        ("def f(", r"mine.py:loss cannot be loaded: SyntaxError: '\(' was never closed"),
        ("def other(): pass", r"mine.py:loss: the file has no function 'loss', but other; mend grpo.policy_loss"),
        ("loss = 3", r"mine.py:loss: the file has no function 'loss', but none"),
        ("def loss(a, b): pass", r"mine.py:loss must take 1 argument by place"),
    ],
)
def test_what_is_wrong_is_one_sentence(source: str | None, sentence: str, tmp_path: Path):
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError, match=sentence):
        load_user_function(KEY, f"{tmp_path}/mine.py:loss", arguments=1)
