"""A user's reward function gets its arguments by name, also where it was written for TRL or ms-swift."""

from __future__ import annotations

import pytest

from chord_megatron.rewards import build_reward_function
from chord_megatron.system.errors import UserError


@pytest.fixture
def load(tmp_path):
    """Builds rewards from the source of a user's file, for data with the columns `answer` and `level`."""
    built = []

    def load(source: str, name: str = "f", columns=("answer", "level"), reference_column="answer"):
        (tmp_path / "mine.py").write_text(source)
        rewards = build_reward_function(
            [f"{tmp_path}/mine.py:{name}"], None, 20, columns=columns, reference_column=reference_column
        )
        built.append(rewards)
        return rewards

    yield load
    for rewards in built:
        rewards.close()


ROWS = (
    ["what is 1 + 1?", "what is 1 + 2?"],
    ["it is 2", "it is 2"],
    ["2", "3"],
    [{"answer": "#### 2", "level": 1}, {"answer": "#### 3", "level": 2}],
)


# Each gives 1 for a completion that holds what the row's reference does, however it is written.
EQUALS = {
    "ours": "def f(prompts, completions, references, **columns):\n"
    "    return [float(r in c) for c, r in zip(completions, references)]",
    "ours, in another order": "def f(references, completions):\n"
    "    return [float(r in c) for c, r in zip(completions, references)]",
    "ours, positional only": "def f(prompts, completions, references, /):\n"
    "    return [float(r in c) for c, r in zip(completions, references)]",
    "ours, with a default": "def f(completions, references, scale=1.0, /):\n"
    "    return [scale * (r in c) for c, r in zip(completions, references)]",
    "ours, as it comes": "def f(*args, **columns):\n    prompts, completions, references = args\n"
    "    return [float(r in c) for c, r in zip(completions, references)]",
    # TRL: keyword arguments only, columns by their names, much that is optional (docs/source/grpo_trainer.md).
    "TRL": "def f(completions, ground_truth, **kwargs):\n"
    "    return [1.0 if t in c else 0.0 for c, t in zip(completions, ground_truth)]",
    "TRL, logging": "def f(completions, ground_truth, log_extra=None, log_metric=None, **kwargs):\n"
    "    assert log_extra is log_metric is None\n"
    "    return [1.0 if t in c else 0.0 for c, t in zip(completions, ground_truth)]",
    "TRL, keywords": "def f(*, prompts, completions, solution, trainer_state=None, **kwargs):\n"
    "    assert prompts[0] == 'what is 1 + 1?'\n"
    "    return [1.0 if t in c else 0.0 for c, t in zip(completions, solution)]",
    "TRL, all of it": "def f(**kwargs):\n"
    "    rows = zip(kwargs['completions'], kwargs['answer'], kwargs['level'])\n"
    "    assert sorted(kwargs) == ['answer', 'completions', 'level', 'prompts', 'references']\n"
    "    return [1.0 if a.removeprefix('#### ') in c else 0.0 for c, a, _ in rows]",
    "TRL, conversations": "def f(completions: list[list[dict[str, str]]], solution: list[str], **kwargs):\n"
    "    contents = [completion[0]['content'] for completion in completions]\n"
    "    assert completions[0] == [{'role': 'assistant', 'content': 'it is 2'}]\n"
    "    return [1.0 if t in c else 0.0 for c, t in zip(contents, solution)]",
    "TRL, asynchronous": "import asyncio\n"
    "async def f(prompts, completions, solution, **kwargs):\n"
    "    await asyncio.sleep(0)\n"
    "    return [1.0 if t in c else 0.0 for c, t in zip(completions, solution)]",
    # ms-swift: a class with __call__, built without arguments of ours (swift/rewards/orm.py).
    "ms-swift": "class ORM:\n"
    "    def __init__(self, args=None, **kwargs): self.args = args\n"
    "    def __call__(self, **kwargs): raise NotImplementedError\n"
    "class f(ORM):\n"
    "    def __call__(self, completions, solution, **kwargs) -> list[float]:\n"
    "        return [1.0 if t in c else 0.0 for c, t in zip(completions, solution)]",
    "ms-swift, asynchronous": "import asyncio\n"
    "class f:\n"
    "    def __init__(self, args=None, **kwargs): self.lock = None\n"
    "    async def __call__(self, completions, solution, **kwargs):\n"
    "        self.lock = self.lock or asyncio.Lock()\n"
    "        async with self.lock:\n"
    "            return await asyncio.gather(*(self.score(c, t) for c, t in zip(completions, solution)))\n"
    "    async def score(self, completion, solution): return float(solution in completion)",
    "an object": "class Reward:\n"
    "    def __init__(self, scale): self.scale = scale\n"
    "    def __call__(self, completions, references):\n"
    "        return [self.scale * (r in c) for c, r in zip(completions, references)]\n"
    "f = Reward(1.0)",
    "a partial": "import functools\n"
    "def g(scale, completions, references): return [scale * (r in c) for c, r in zip(completions, references)]\n"
    "f = functools.partial(g, 1.0)",
    "decorated": "import functools\n"
    "def logged(g):\n"
    "    @functools.wraps(g)\n"
    "    def inner(*args, **kwargs): return g(*args, **kwargs)\n"
    "    return inner\n"
    "@logged\n"
    "def f(completions, references): return [float(r in c) for c, r in zip(completions, references)]",
}


@pytest.mark.parametrize("form", EQUALS)
def test_arguments_go_by_name(form, load):
    rewards = load(EQUALS[form])
    assert rewards(*ROWS).total == [1.0, 0.0]
    assert rewards(*ROWS).total == [1.0, 0.0]


def test_a_column_of_the_data_wins_over_a_reference_of_that_name(load):
    source = "def f(completions, solution): return [len(s) for s in solution]"
    rewards = load(source, columns=["answer", "solution"])
    columns = [{"answer": "2", "solution": "long"}, {"answer": "3", "solution": "longer"}]
    assert rewards(*ROWS[:3], columns).total == [4.0, 6.0]


def test_a_column_that_a_batch_lacks_is_none(load):
    source = "def f(completions, level): return [1.0 if n is None else n for n in level]"
    assert load(source)(*ROWS[:3], [{"level": 5}, {}]).total == [5.0, 1.0]
    assert load(source)(*ROWS[:3], [{}, {}]).total == [1.0, 1.0]


def test_the_reference_goes_by_the_name_of_its_column(load):
    source = "def f(completions, ground_truth, **columns): return [float(t) for t in ground_truth]"
    rewards = load(source, columns=["reward_model"], reference_column="reward_model.ground_truth")
    assert rewards(*ROWS[:3], [{"reward_model": {"ground_truth": "2"}}] * 2).total == [2.0, 3.0]
    source = "def f(completions, verdict): return [float(v) for v in verdict]"
    assert load(source, columns=[], reference_column="labels.verdict")(*ROWS[:3], [{}] * 2).total == [2.0, 3.0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def f(completions, trainer_state, **kwargs): return [0.0, 0.0]",
            "needs 'trainer_state', which is not offered; offered are prompts, completions, references, "
            "completion_ids, the columns answer, level, and the reference as ground_truth, solution; rename the "
            "parameter, or give it a default$",
        ),
        (
            "def f(completions, difficulty, trainer_state, log_extra=None): return [0.0, 0.0]",
            "needs 'difficulty', 'trainer_state', which are not offered; offered are prompts,",
        ),
        ("def f(p, c, r, **columns): return [0.0, 0.0]", "needs 'p', 'c', 'r', which are not offered"),
        (
            "class f:\n    def __init__(self, tokenizer): pass\n    def __call__(self, completions): return [0.0]",
            "mine.py:f: TypeError: a class that needs 'tokenizer'; name an object of it$",
        ),
        (
            "class f:\n    def __init__(self): raise OSError('no key')\n    def __call__(self, completions): pass",
            r"mine.py:f: OSError: no key \(.*mine.py:2\)$",
        ),
        ("class f:\n    pass", "mine.py:f: TypeError: its objects cannot be called; they need __call__$"),
        ("f = 3", "mine.py:f: AttributeError: no function 'f'; the file has none$"),
        (
            "async def f(completions):\n    for c in completions:\n        yield 1.0",
            "mine.py:f: TypeError: a generator; return a list of numbers$",
        ),
        ("def f(completions):\n    yield 1.0", "mine.py:f: TypeError: a generator; return a list of numbers$"),
    ],
)
def test_what_cannot_be_called_is_refused_when_it_is_loaded(source, message, load):
    with pytest.raises(UserError, match=message):
        load(source)


def test_completions_that_are_taken_for_conversations_are_explained(load):
    rewards = load("def f(completions, **kwargs): return [float(len(c[0]['content'])) for c in completions]")
    with pytest.raises(UserError, match=r"TypeError: .*; completions are texts; annotate them as in TRL, "):
        rewards(*ROWS)


def test_a_failing_asynchronous_function_names_its_line(load):
    rewards = load("async def f(completions):\n    raise KeyError('x')")
    with pytest.raises(UserError, match=r"mine.py:f: KeyError: 'x' \(.*mine.py:2\)$"):
        rewards(*ROWS)


def test_without_known_columns_nothing_of_them_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions, level): return level")
    rewards = build_reward_function([f"{tmp_path}/mine.py:f"], None, 20)
    assert rewards(*ROWS).total == [1.0, 2.0]
    with pytest.raises(UserError, match=r"TypeError: f\(\) missing 1 required positional argument: 'level'"):
        rewards(*ROWS[:3], [{}, {}])
    rewards.close()
