"""What docs/rewards.md promises to a reward function, statement by statement, in its own words where it has code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from chord_megatron.config import Config
from chord_megatron.rewards import build_reward_function
from chord_megatron.system.errors import UserError

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
PROMPTS = ["<|user|>a<|end|><|assistant|>"] * 2 + ["<|user|>b<|end|><|assistant|>"] * 2
COMPLETIONS, REFERENCES = ["one two", "one", "two", "<think>three"], ["1", "1", "2", "2"]
COLUMNS = [{"level": 1.0}] * 2 + [{"level": 3.0, "extra": "x"}] * 2
TOLD = "import json\ndef tell(**what):\n    open(__file__ + '.told', 'a').write(json.dumps(what) + chr(10))\n"


def code(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Rewards from the source of `f`; `tell(...)` in it is read by `told`."""
    built = []

    def build(source: str, name: str = "f", timeout_seconds: float = 60, **options: Any) -> Any:
        (tmp_path / "mine.py").write_text(TOLD + source)
        columns = ["extra", "level"]
        built.append(
            build_reward_function([f"{tmp_path}/mine.py:{name}"], None, timeout_seconds, columns=columns, **options)
        )
        return built[-1]

    yield build
    for rewards in built:
        rewards.close()


def call(rewards: Any) -> list[float]:
    ids = [[7, 8], [7], [8], [9]]
    found = rewards(PROMPTS, COMPLETIONS, REFERENCES, COLUMNS, completion_ids=ids, num_generations=2)
    return found.total


def told(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "mine.py.told").read_text().splitlines()]


def test_the_example_of_the_page(build: Callable[..., Any], tmp_path: Path):
    (tmp_path / "words.txt").write_text("one two")
    rewards = build(code("python")[0], "known_words")
    (tmp_path / "words.txt").unlink()  # it was read when the file was loaded
    assert call(rewards) == [1.0, 1.0, 3.0, 0.0]


def test_the_pages_yaml_is_a_configuration():
    (group,) = code("yaml")
    required = {"model": {"path": "m"}, "train": {"output_dir": "o", "global_batch_size": 8, "train_iters": 1}}
    config = Config.model_validate({**required, **yaml.safe_load(group)})
    assert config.rewards.environment == ["LOCAL_RANK", "JUDGE_API_KEY"]
    compile(code("python")[1], "judge.py", "exec")


@pytest.mark.parametrize(
    ("signature", "arguments"),
    [
        ("references, completions", "references, completions"),
        ("completion_ids, prompts, level", "completion_ids, prompts, level"),
        ("answer, completions, solution, ground_truth", "answer, completions, solution, ground_truth"),
        ("completions, references, /", "completions, references"),  # by their names all the same
    ],
)
def test_arguments_go_by_name(build: Callable[..., Any], tmp_path: Path, signature: str, arguments: str):
    names = arguments.split(", ")
    pairs = ", ".join(f"{name}={name}" for name in names)
    call(build(f"def f({signature}):\n    tell({pairs})\n    return [0] * 4"))
    values = {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "completion_ids": [[7, 8], [7], [8], [9]],
        "level": [1.0, 1.0, 3.0, 3.0],
        **dict.fromkeys(("references", "answer", "solution", "ground_truth"), REFERENCES),
    }
    assert told(tmp_path) == [{name: values[name] for name in names}]


def test_all_columns_and_what_a_row_lacks(build: Callable[..., Any], tmp_path: Path):
    call(build("def f(completions, **columns):\n    tell(**columns)\n    return [0] * 4"))
    (columns,) = told(tmp_path)
    assert columns["level"] == [1.0, 1.0, 3.0, 3.0] and columns["extra"] == [None, None, "x", "x"]


def test_by_place_without_names(build: Callable[..., Any], tmp_path: Path):
    call(build("def f(*args):\n    tell(args=args)\n    return [0] * 4"))
    assert told(tmp_path) == [{"args": [PROMPTS, COMPLETIONS, REFERENCES]}]


def test_a_name_that_nothing_goes_by_is_refused(build: Callable[..., Any]):
    with pytest.raises(UserError, match="needs 'temperature', which is not offered"):
        build("def f(completions, temperature):\n    return [0] * 4")


@pytest.mark.parametrize("returned", ["numpy.ones(4)", "torch.ones(4)", "[1, 1.0, True, 1]"])
def test_what_it_may_return(build: Callable[..., Any], returned: str):
    module = returned.partition(".")[0]
    source = f"import {module}\n" if module.isidentifier() else ""
    assert call(build(f"{source}def f(completions):\n    return {returned}")) == [1.0] * 4


def test_where_it_runs(
    build: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path.parent)
    for name in ("RANK", "LOCAL_RANK", "JUDGE_API_KEY", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "3")
    (tmp_path / "beside.py").write_text("VALUE = 5")
    source = (
        "import beside, os, sys\ncalls = 0\nprint('loaded')\n"
        "def f(completions):\n"
        "    global calls\n    calls += 1\n    print('called'); os.write(1, b'written\\n')\n"
        "    names = ['RANK', 'LOCAL_RANK', 'JUDGE_API_KEY', 'CUDA_VISIBLE_DEVICES']\n"
        "    tell(calls=calls, read=sys.stdin.read(), folder=os.getcwd(), value=beside.VALUE, process=os.getpid(),\n"
        "         seen=[name for name in names if name in os.environ])\n"
        "    sys.stdout.flush()\n    return [0] * 4"
    )
    rewards = build(source, environment=["LOCAL_RANK"])
    call(rewards)
    call(rewards)
    first, second = told(tmp_path)
    assert (first["calls"], second["calls"]) == (1, 2) and first["process"] == second["process"]
    assert (first["read"], first["folder"], first["value"]) == ("", str(tmp_path.parent), 5)
    assert first["seen"] == ["LOCAL_RANK", "CUDA_VISIBLE_DEVICES"]
    out, err = capfd.readouterr()
    assert out == "" and err.count("loaded") == 1 and err.count("called") == 2 and err.count("written") == 2


def test_the_time_counts_for_loading_too(build: Callable[..., Any]):
    with pytest.raises(UserError, match=r"no answer within rewards\.timeout_seconds=0\.5"):
        build("import time\ntime.sleep(60)\ndef f(completions): ...", timeout_seconds=0.5)
