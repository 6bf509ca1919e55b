"""`chord-megatron init`: a commented configuration that `validate` accepts as it stands."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from chord_megatron.cli import app
from chord_megatron.config import Config, load_config
from tests.unit.chat_templates import QWEN25, tokenizer_of

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
GSM8K = [{"question": f"What is {n}+{n}?", "answer": f"{n} and {n} make {2 * n}.\n#### {2 * n}"} for n in range(60)]
MATH = [
    {"problem": f"{n}+{n}?", "solution": rf"We add both numbers: \boxed{{{2 * n}}}", "answer": str(2 * n)}
    for n in range(60)
]
MS_SWIFT = [
    {
        "messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"#### {n}"}],
        "solution": f"{n}",
    }
    for n in range(60)
]
VERL = [
    {"prompt": [{"role": "user", "content": f"{n}?"}], "reward_model": {"style": "rule", "ground_truth": f"{n}"}}
    for n in range(60)
]
CHAT_ONLY = [{"messages": row["messages"]} for row in MS_SWIFT]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model of 7B parameters but for its weights."""
    (tmp_path / "model").mkdir()
    shutil.copy(CONFIGS / "Qwen2.5-7B" / "config.json", tmp_path / "model")
    tokenizer_of(QWEN25).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def made(folder: Path, rows: list[dict[str, Any]], *arguments: str, nproc: int = 8) -> Config:
    """The recipe for these rows, which `validate` accepts."""
    write(folder / "data.jsonl", rows)
    result = run("init", "model", "data.jsonl", "--nproc-per-node", str(nproc), *arguments)
    assert result.exit_code == 0, result.output
    checked = run("validate", "my.yaml", "--nproc-per-node", str(nproc))
    assert checked.exit_code == 0, checked.output
    lines = (folder / "my.yaml").read_text(encoding="utf-8").splitlines()
    of_keys = [(line, before) for before, line in pairwise(lines) if line.startswith("  ") and line[2] != "#"]
    assert all(" # " in line or before.startswith("  # ") for line, before in of_keys)
    return load_config("my.yaml")


def test_gsm8k_worked_answers_are_references_and_experts(folder):
    config = made(folder, GSM8K)
    data, chord, train = config.data, config.chord, config.train
    assert (data.dataset, data.prompt_column, data.reference_column) == ("data.jsonl", "question", "answer")
    assert data.system_prompt is not None and "####" in data.system_prompt
    assert (chord.chord_sft_dataset, chord.chord_sft_prompt_column, chord.chord_sft_answer_column) == (
        "data.jsonl",
        "question",
        "answer",
    )
    assert (chord.chord_mu_peak, chord.chord_mu_valley, config.rewards.answer_format) == (0.9, 0.05, "hash")
    # <|im_start|>system\nYou are helpful.<|im_end|>\n... is 53 + "What is 10+10?": 14 bytes
    assert data.max_prompt_length == 128
    assert (train.output_dir, train.train_iters, train.global_batch_size) == ("runs/my", 4, 256)


def test_math_has_its_reference_and_its_solution_in_two_columns(folder):
    config = made(folder, MATH)
    assert (config.data.prompt_column, config.data.reference_column) == ("problem", "answer")
    assert config.chord.chord_sft_answer_column == "solution"
    assert config.data.system_prompt is not None and "boxed" in config.data.system_prompt
    assert config.rewards.answer_format == "boxed"


def test_ms_swift_messages_are_prompts_and_experts(folder):
    config = made(folder, MS_SWIFT)
    assert (config.data.dataset, config.data.reference_column) == ("data.jsonl", "solution")
    assert config.chord.chord_sft_dataset == "data.jsonl"


def test_verl_prompts_without_answers_are_for_grpo_alone(folder):
    config = made(folder, VERL)
    assert config.data.reference_column == "reward_model.ground_truth"
    assert (config.chord.chord_sft_dataset, config.chord.chord_mu_peak, config.chord.chord_mu_valley) == (None, 0, 0)


def test_rows_that_are_recognised_need_no_column_of_the_question(folder):
    rows = [{"instruction": "Add.", "input": f"{n}+{n}", "output": f"We add: #### {2 * n}"} for n in range(60)]
    config = made(folder, rows)
    assert config.chord.chord_sft_dataset == "data.jsonl"
    assert (config.chord.chord_sft_prompt_column, config.chord.chord_sft_answer_column) == (None, "output")
    assert "# prompts: 60 rows, Alpaca: instruction (text); the longest" in (folder / "my.yaml").read_text("utf-8")


def test_answers_without_references_are_for_supervised_training_alone(folder):
    config = made(folder, CHAT_ONLY)
    assert (config.data.dataset, config.chord.chord_sft_dataset) == (None, "data.jsonl")
    assert (config.chord.chord_mu_peak, config.chord.chord_mu_valley) == (1, 1)


def test_experts_of_a_file_of_their_own(folder):
    write(folder / "experts.jsonl", [{"prompt": "1+1?", "response": "It is 2"}] * 5)
    config = made(folder, VERL, "--experts", "experts.jsonl")
    assert config.chord.chord_sft_answer_column == "response"
    # These answers mark nothing: completions are not asked to, or rewards would reject the experts.
    assert (config.data.system_prompt, config.rewards.answer_format) == (None, "any")
    assert config.chord.chord_sft_global_batch_size == 5


@pytest.mark.parametrize("nproc", [1, 2, 8])
def test_any_number_of_processes(folder, nproc):
    """On one GPU no layout of a 7B model fits, which the recipe says."""
    config = made(folder, GSM8K, nproc=nproc)
    parallel = config.parallel
    size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    assert nproc % size == 0
    text = (folder / "my.yaml").read_text(encoding="utf-8")
    assert ("# On 1 x h100: none of" in text) == (nproc == 1)


def test_a_recipe_is_never_written_over_a_file(folder):
    write(folder / "data.jsonl", GSM8K)
    (folder / "my.yaml").write_text("mine", encoding="utf-8")
    result = run("init", "model", "data.jsonl")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: --output my.yaml is there already; name another file, or remove it\n"
    assert (folder / "my.yaml").read_text(encoding="utf-8") == "mine"


def test_a_run_directory_that_is_taken_is_left_alone(folder):
    (folder / "runs" / "my").mkdir(parents=True)
    assert made(folder, GSM8K).train.output_dir == "runs/my-2"


def test_texts_of_others_stay_in_their_line(folder):
    """A file name cannot leave its quotes, nor a comment."""
    name = 'a"\n# b: {c}\x1b.jsonl'
    write(folder / name, VERL)
    result = run("init", "model", name)
    assert result.exit_code == 0, result.output
    assert load_config("my.yaml").data.dataset == name


@pytest.mark.parametrize(
    ("rows", "arguments", "sentence"),
    [
        ([{"a": "1", "b": "2"}], [], "data.jsonl: no column looks like a question (its columns are 'a', 'b'); rename"),
        ([{"prompt": "1"}], [], "data.jsonl has neither references to compare completions with"),
        ([{"prompt": "1", "answer": "1"}], ["--experts", "data.jsonl", "--output", "no/my.yaml"], "does not exist"),
        ([{"prompt": "1", "answer": "1"}], ["--experts", "none.jsonl"], "cannot read none.jsonl"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(folder, rows, arguments, sentence):
    write(folder / "data.jsonl", rows)
    result = run("init", "model", "data.jsonl", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr and result.stderr.count("\n") == 1
    assert not (folder / "my.yaml").exists()


def test_a_short_model_is_asked_for_no_mark(folder):
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": 128}
    path.write_text(json.dumps(config))
    recipe = made(folder, GSM8K)
    assert recipe.data.system_prompt is None
    assert recipe.chord.chord_sft_max_length == 128
