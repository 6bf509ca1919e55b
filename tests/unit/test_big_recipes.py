"""The recipes for eight GPUs: their rules, what README.md says of memory and time, their rewards and their data."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_tokenizer import write_tokenizer
from typer.testing import CliRunner

from chord_megatron.cli import app
from chord_megatron.config import ChordConfig, DataConfig, load_config
from chord_megatron.data.load import load_run_data
from chord_megatron.rewards import build_reward_function
from tests.unit.chat_templates import QWEN25, tokenizer_of

ROOT = Path(__file__).parents[2]
CONFIGS, FOLDER = ROOT / "tests" / "data" / "configs", ROOT / "examples" / "recipes"
MODELS = {
    "paper_math_qwen2.5_7b.yaml": "Qwen2.5-7B",
    "paper_tools_llama3.2_3b.yaml": "Llama-3.2-3B",
    "qwen3_30b_a3b.yaml": "Qwen3-30B-A3B",
}
LINK, ROW = re.compile(r"\[.*?\]\((.*?)\)((?: `[\w.=]+`)*)"), re.compile(r"^\| (\[.*) \|$", re.MULTILINE)
# What a small machine without GPUs has not; all else that `doctor` asks for must be there.
OF_THE_MACHINE = {"weights", "host memory", "disk", "vLLM"}


def table() -> list[list[str]]:
    """Rows of README.md: file, overrides, model, layout, GB, s/step, steps, hours."""
    rows = []
    for row in ROW.findall((FOLDER / "README.md").read_text(encoding="utf-8")):
        cells = row.split(" | ")
        link = LINK.fullmatch(cells[0])
        assert link, cells[0]
        rows.append([link[1], link[2].replace("`", ""), *cells[1:]])
    return rows


def overrides_at_head(recipe: Path) -> list[str]:
    """The other method's, out of the comment in front of a recipe."""
    head = recipe.read_text(encoding="utf-8").partition("\nmodel:")[0]
    return [word for line in re.findall(r"^#   (chord\..*)$", head, re.MULTILINE) for word in line.split()]


def imported(name: str) -> ModuleType:
    """A file of the folder, as Python imports its neighbours when it is started there."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(params=MODELS)
def recipe(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Its path and the overrides with which it can be looked at here: a model's shape, and some tokenizer."""
    monkeypatch.chdir(ROOT)  # rewards are named from there
    write_tokenizer(tmp_path)
    shutil.copy(CONFIGS / MODELS[request.param] / "config.json", tmp_path)
    arguments = [f"examples/recipes/{request.param}", f"model.path={tmp_path}", f"train.output_dir={tmp_path}/run"]
    # README.md says so: that key alone is refused without a GPU.
    return [*arguments, *["optimizer.optimizer_cpu_offload=false"] * ("30b" in request.param)]


def test_every_recipe_is_in_the_table():
    assert {Path(row[0]).name for row in table()} == {*MODELS, "chord_8gpu.yaml"}
    assert {path.name for path in FOLDER.glob("*.yaml")} == set(MODELS)


def test_it_validates_on_eight_processes_and_so_does_the_other_method(recipe: list[str]):
    for overrides in ([], overrides_at_head(ROOT / recipe[0])):
        result = CliRunner().invoke(app, ["validate", *recipe, *overrides, "--nproc-per-node", "8", "--json"])
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["plan"]["world_size"] == 8


@pytest.mark.slow  # it starts processes and imports every package; `validate` above has the same rules
def test_the_doctor_asks_for_a_larger_machine_alone(recipe: list[str]):
    result = CliRunner().invoke(app, ["doctor", *recipe, "--nproc-per-node", "8", "--json"])
    assert result.exit_code in (0, 1), result.stderr
    problems = {problem.partition(":")[0] for problem in json.loads(result.stdout)["problems"]}
    assert problems <= OF_THE_MACHINE


@pytest.mark.parametrize("row", table(), ids=lambda row: Path(row[0]).name)
def test_the_table_says_what_the_planner_computes(row: list[str], monkeypatch: pytest.MonkeyPatch):
    """Of the layout that the recipe has: `plan` changes nothing of it. 72 GB is what it takes to be usable."""
    monkeypatch.chdir(ROOT)
    file, overrides, model, layout, gb, seconds, steps, hours = row
    arguments = [str(FOLDER / file), f"model.path={CONFIGS / model}", *overrides.split()]
    result = CliRunner().invoke(app, ["plan", *arguments, "--gpus", "8", "--gpu", "h100", "--show", "9999", "--json"])
    assert result.exit_code == 0, result.stderr
    (own,) = (found for found in json.loads(result.stdout)["layouts"] if not found["settings"])
    peak = max(max(stage["training"], stage["generating"]) for stage in own["bytes_by_stage"])
    time = own["seconds"]["total"]
    computed = (own["layout"], f"{peak / 1e9:.1f}", f"{time:.1f}", f"{time * int(steps) / 3600:.1f}")
    assert computed == (layout, gb, seconds, hours)
    assert peak < 72e9
    train = load_config(FOLDER / file).train
    assert train.num_train_epochs or train.train_iters == int(steps)  # an epoch of ms-swift's: its README counts it


WANTED = '[Get Weather(city="Oslo", days=3), stop()]'
CALLS = [
    (WANTED, 1.0),
    ("[stop(), Get Weather(days=3, city='Oslo')]", 1.0),
    ("<think>Both [a(b=1)].</think>\n" + WANTED, 1.0),
    ('[Get Weather(city="Oslo", days=3)]', 0.0),  # one is missing
    ('[Get Weather(city="Oslo", days=3), stop(), stop()]', 0.0),
    ('[Get Weather(city="Oslo", days="3"), stop()]', 0.0),
    ('[Get Weather(city="Oslo", days=3.0), stop()]', 0.0),
    ('[Get Weather(city="Oslo", days=3, unit="C"), stop()]', 0.0),
    ('[Get Weather("Oslo", 3), stop()]', 0.0),
    ("Here they are: " + WANTED, 0.0),
    (WANTED + WANTED, 0.0),
    ("", 0.0),
    ("[]", 0.0),
    (WANTED[:-3], 0.0),  # cut off
    ("<think>" + WANTED, 0.0),
]
MALFORMED = [
    "[a(x=1),]", "[,a()]", "[a() b()]", "[a(x=1)(y=2)]", "[(x=1)]", "[a(**{})]", "[a(x=y)]", "[a(x=1, x=2)]",
    "[a(x={1: 2, 'b': 3})]", "[a(x={(1,): 2})]", "[a(x=\0)]", "[a(x='\ud800)]", "[a(x='\ud800')]",
    "[a(x=" + "[" * 9999 + "]" * 9999 + ")]",
    "[a(x=" + "-" * 99999 + "1)]", "[a(x=" + "9" * 9999 + ")]", "[" + "(" * 9999 + "]", "[a(x=" + r"\'" * 9999 + ")]",
    "[a(x=b'1')]", "[a(x={1})]", "[a(x=1))]", "[a(x=f'{1}')]",
]  # fmt: skip


def test_calls_are_paid_by_names_and_arguments():
    """By the file as the recipe names it, in its process."""
    reward = f"{FOLDER / 'tool_call_reward.py'}:same_calls"
    completions = [completion for completion, _ in CALLS]
    functions = build_reward_function([reward], None, 60.0)
    try:
        rewards = functions([""] * len(CALLS), completions, [WANTED] * len(CALLS), [{}] * len(CALLS))
    finally:
        functions.close()
    assert rewards.total == [value for _, value in CALLS]


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_no_list_of_calls_earns_nothing(text: str):
    reward = imported("tool_call_reward")
    assert reward.read_calls(text) is None
    assert reward.same_calls([text, "[a(x=[1, {'k': None}])]"], ["[a()]", "[a(x=[1, {'k': None}])]"]) == [0.0, 1.0]
    assert reward.same_calls(["[a()]"], [text]) == [None]  # a reference without calls ends the run


def test_arguments_are_compared_as_json():
    read = imported("tool_call_reward").read_calls
    assert read("[b.c(x=(1, True), z='it\\'s )'), a b(u={'q': -1.5, 'p': None})]") == [
        ("a b", '{"u": {"p": null, "q": -1.5}}'),
        ("b.c", '{"x": [1, true], "z": "it\'s )"}'),
    ]


# Rows in the form of open-r1/OpenR1-Math-220k and Team-ACE/ToolACE.


def math_row(number: int, answer: str, right: list[bool], problem: str = "What is {}?") -> dict[str, Any]:
    generations = [f"<think>{number} {nth}</think> \\boxed{{{answer}}}" for nth in range(len(right))]
    return {
        "problem": problem.format(number),
        "answer": answer,
        "generations": generations,
        "correctness_math_verify": right,
    }


TOOL_ROW = {
    "system": "You may call functions. [func(name=value)]",
    "conversations": [
        {"from": "user", "value": "Weather?"},
        {"from": "assistant", "value": "Where?"},
        {"from": "user", "value": "Oslo"},
        {"from": "assistant", "value": '[Get Weather(city="Oslo")]'},
        {"from": "tool", "value": "{}"},
        {"from": "assistant", "value": "Fine."},
    ],
}


def test_rows_of_openr1_math():
    make = imported("make_data")
    right = math_row(1, "12", [False, True])
    assert make.math_expert(right) == {"problem": "What is 1?", "solution": "<think>1 1</think> \\boxed{12}"}
    assert make.math_prompt(right) is None  # one right generation
    assert make.math_prompt(math_row(1, " -12 ", [True, True])) == {"problem": "What is 1?", "answer": "-12"}
    assert make.math_prompt(math_row(1, "1/2", [True, True])) is None
    assert make.math_expert(math_row(1, "1/2", [True]))["problem"] == "What is 1?"
    for row in (
        math_row(1, "12", [False, False]),
        math_row(1, "12", [True, True], "\u6570 {}"),
        {**right, "generations": ["x" * 24_001] * 2},
        {**right, "correctness_math_verify": None},
    ):
        assert (make.math_expert(row), make.math_prompt(row)) == (None, None)


def test_each_row_goes_to_one_file_and_too_few_write_nothing():
    make = imported("make_data")
    rows = [
        math_row(number, "12" if number % 2 else "1/2", [True, True]) for number in (0, 1, 0, 2, 3, 1, 3, 4, 5, 6, 7)
    ]
    parts = [make.Part("experts", 2, make.math_expert), make.Part("prompts", 3, make.math_prompt)]
    files = make.distribute(rows, parts)
    assert [row["problem"] for row in files["experts"]] == ["What is 0?", "What is 1?"]
    assert [row["problem"] for row in files["prompts"]] == ["What is 3?", "What is 5?", "What is 7?"]
    with pytest.raises(SystemExit, match=r"^the data set is too small: 2 of 3 prompts; nothing was written$"):
        make.distribute(rows[:9], parts)
    tools = [make.tool_row({**TOOL_ROW, "system": system}) for system in ("a", "A", "b")]
    assert [make.question(row) for row in tools[:2]] == [make.question(tools[0])] * 2 != [make.question(tools[2])] * 2


def test_rows_of_toolace_are_read_as_prompts_and_as_experts(tmp_path: Path):
    """Up to the first call; the reference of a prompt is what the expert teaches."""
    make = imported("make_data")
    made = make.tool_row(TOOL_ROW)
    assert made == {"system": TOOL_ROW["system"], "conversations": TOOL_ROW["conversations"][:4]}
    assert make.tool_row({**TOOL_ROW, "conversations": TOOL_ROW["conversations"][:3]}) is None
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(made) + "\n", encoding="utf-8")
    tokenizer, chord = tokenizer_of(QWEN25), ChordConfig(chord_sft_dataset=str(path))
    data = load_run_data(DataConfig(dataset=str(path)), chord, tokenizer, expert_max_length=500)
    (prompt,), (expert,) = data.prompts, data.experts
    assert prompt.reference == '[Get Weather(city="Oslo")]'
    text = tokenizer.decode(prompt.tokens)
    assert "[func(name=value)]" in text and text.count("Where?") == 1 and "Get Weather" not in text
    assert tokenizer.decode(expert.tokens).startswith(text + '[Get Weather(city="Oslo")]<|im_end|>')
