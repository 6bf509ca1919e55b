"""Reward functions by name and weight, and a user's functions in a real child process."""

from __future__ import annotations

from datetime import date

import pytest

from chord_megatron.rewards import build_reward_function
from chord_megatron.system.errors import UserError


def test_total_is_the_weighted_sum():
    rewards = build_reward_function(["accuracy", "format"], [2.0, 0.5], timeout_seconds=1)
    completions = ["<think>a</think><answer>1</answer>", "#### 1", "<think>a</think><answer>2</answer>"]
    result = rewards(["p"] * 3, completions, ["1"] * 3, [{}] * 3)
    assert result.by_function == {"accuracy": [1.0, 1.0, 0.0], "format": [1.0, 0.0, 1.0]}
    assert result.total == [2.5, 2.0, 0.5]
    rewards.close()


@pytest.mark.parametrize(
    ("functions", "weights", "message"),
    [
        (["acuracy"], None, r"unknown reward function 'acuracy'; use accuracy, format.*mean 'accuracy'"),
        (
            ["nothing"],
            None,
            r"unknown reward function 'nothing'; use .*soft_overlong or path.py:function$",
        ),
        (["absent.py"], None, r"unknown reward function 'absent.py'"),
        (["absent.py:f"], None, r"reward function absent.py:f: .*absent.py does not exist"),
        (["accuracy"], [1.0, 2.0], r"reward_weights has 2 values for 1 rewards.reward_funcs"),
        (["format", "format"], None, r"names format twice; name it once, with the weight of both$"),
    ],
)
def test_configuration_errors(functions, weights, message):
    with pytest.raises(UserError, match=message):
        build_reward_function(functions, weights, timeout_seconds=1)


@pytest.fixture
def plugin(tmp_path):
    """Builds rewards from the source of a user's file; every child is ended after the test."""
    built = []

    def build(source: str, function: str = "f", timeout_seconds: float = 20):
        (tmp_path / "mine.py").write_text(source)
        built.append(build_reward_function([f"{tmp_path}/mine.py:{function}"], None, timeout_seconds))
        return lambda *args: built[-1](*args).total

    yield build
    for rewards in built:
        rewards.close()


TWO = (["p", "q"], ["aa", "b"], ["1", "2"], [{"level": 3}, {"level": 4}])


def test_plugin_gets_every_argument_and_keeps_its_state(plugin, tmp_path):
    (tmp_path / "neighbour.py").write_text("SCALE = 100\n")
    rewards = plugin(
        "import os\nfrom neighbour import SCALE\ncalls = 0\n"
        "def f(prompts, completions, references, level, day, **columns):\n"
        "    global calls; calls += 1\n"
        "    print('to stdout'); os.system('echo from a child')\n"
        "    assert (prompts, day, columns) == (['p', 'q'], ['2024-01-02', None], {})\n"
        "    rows = zip(completions, references, level)\n"
        "    return [SCALE * calls + len(c) + int(r) + n for c, r, n in rows]\n"
    )
    columns = [{"level": 3, "day": date(2024, 1, 2)}, {"level": 4}]
    assert rewards(*TWO[:3], columns) == [106.0, 107.0]
    assert rewards(*TWO[:3], columns) == [206.0, 207.0]


def test_plugin_may_return_arrays_and_long_lines_pass(plugin):
    rewards = plugin("import numpy as np\ndef f(completions): return np.array([len(x) for x in completions])")
    completions = ["x" * 300_000, "é\n" * 10]
    assert rewards(["p"] * 2, completions, ["1"] * 2, [{}] * 2) == [300_000.0, 20.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1\n    raise KeyError('oops')", r"mine.py:f: KeyError: 'oops' \(.*mine.py:3\)"),
        ("raise SystemExit(3)", r"mine.py:f: SystemExit: 3 \(.*mine.py:2\)"),
        ("import os; os._exit(7)", r"mine.py:f: its process ended with exit code 7"),
        ("return [1.0, float('nan')]", r"mine.py:f returned nan, not a finite number, at index 1"),
        ("return [float('-inf'), 1]", r"returned -inf, not a finite number, at index 0"),
        ("return [1.0, None]", r"returned None, not a finite number, at index 1"),
        ("return ['1', 2]", r"returned '1', not a finite number, at index 0"),
        ("return [1.0]", r"mine.py:f returned 1 rewards for 2 completions"),
        ("return 1.0", r"mine.py:f must return a list of numbers, not 1.0"),
    ],
)
def test_plugin_failures_name_the_function(plugin, body, message):
    rewards = plugin(f"def f(*args, **columns):\n    {body}\n")
    with pytest.raises(UserError, match=message):
        rewards(*TWO)


def test_columns_that_the_function_does_not_take_stay_away(plugin):
    assert plugin("def f(prompts, completions, references): return [0, 1]")(*TWO) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def g(): pass", r"mine.py:f: AttributeError: no function 'f'; the file has g"),
        (
            "x = 1\nimport nowhere",
            r"mine.py:f: ModuleNotFoundError: No module named 'nowhere' \(.*mine.py:2\)",
        ),
        ("def f(:\n", r"mine.py:f: SyntaxError: .*\(.*mine.py:1\)"),
    ],
)
def test_a_file_that_does_not_load_fails_at_once(plugin, source, message):
    with pytest.raises(UserError, match=message):
        plugin(source)


def test_an_endless_function_is_killed(plugin):
    """With all that it started: test_reward_processes.py."""
    rewards = plugin("def f(*args, **columns):\n    while True: pass\n", timeout_seconds=1)
    with pytest.raises(UserError, match=r"mine.py:f: no answer within rewards.timeout_seconds=1$"):
        rewards(*TWO)
    with pytest.raises(UserError, match="its process has ended"):  # a later call does not hang
        rewards(*TWO)
