"""`chord-megatron evaluate` on runs, checkpoints and models: training's own numbers, and what goes on after a kill."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import finish, read_lines, read_metrics, run_here, start, succeeded, train_here, wait_until, write_config

from chord_megatron.types import Metrics

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def trained(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished run in run/, which evaluated each second step on prompts in two forms."""
    root = tmp_path_factory.mktemp("evaluated")
    config = write_config(assets, root)
    outcome = train_here(
        config,
        f"data.eval_dataset={assets / 'prompts.jsonl'}",
        "data.num_eval_prompts=7",
        "train.eval_steps=2",
        "train.train_iters=4",
    )
    succeeded(outcome)
    return root


def evaluation_of(root: Path, step: int) -> Metrics:
    (found,) = (line for line in read_metrics(root / "run") if "loss" not in line and line["step"] == step)
    return found


def evaluate(path: Path, *arguments: str) -> dict[str, Any]:
    outcome = succeeded(run_here("evaluate", path, *arguments, "--json"))
    return json.loads(outcome.stdout)


@pytest.mark.parametrize("step", [2, 4])
def test_greedy_numbers_are_those_of_training(trained: Path, tmp_path: Path, step: int):
    expected = evaluation_of(trained, step)
    found = evaluate(trained / "run", f"--checkpoint={step}", f"--output={tmp_path / 'x.jsonl'}")
    assert (found["step"], found["num_prompts"], found["k"], found["temperature"]) == (step, 7, 1, 0)
    for name in ("reward_mean", "response_length_mean", "truncated_fraction"):
        assert found["metrics"][name]["value"] == expected[f"eval_{name}"], name


def test_batches_are_the_same_completions_as_all_at_once(trained: Path, tmp_path: Path):
    arguments = ("--k=3", "--temperature=1.0")
    whole = evaluate(trained / "run", *arguments, f"--output={tmp_path / 'whole.jsonl'}")
    parts = evaluate(trained / "run", *arguments, f"--output={tmp_path / 'parts.jsonl'}", "rollout.max_batch_size=6")
    assert read_lines(tmp_path / "whole.jsonl")[1:] == read_lines(tmp_path / "parts.jsonl")[1:]
    assert whole["metrics"] == parts["metrics"]
    assert [name for name in whole["metrics"] if "@" in name] == ["pass@1", "pass@2", "pass@3", "maj@3"]


def test_an_evaluation_that_was_ended_goes_on(trained: Path, tmp_path: Path):
    output = tmp_path / "x.jsonl"
    arguments = ("--k=2", "--temperature=0.8", f"--output={output}", "rollout.max_batch_size=4")
    expected = evaluate(trained / "run", *arguments)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:4]) + lines[4][:30])  # as a kill leaves it
    assert evaluate(trained / "run", *arguments) == expected
    assert output.read_bytes() == b"".join(lines)
    again = run_here("evaluate", trained / "run", *arguments)
    assert "prompts\n" not in again.stderr.replace("on 7 prompts", "")  # nothing is left to draw
    refused = run_here("evaluate", trained / "run", *arguments, "train.seed=5")
    assert refused.code == 2 and "drawn with seed=0, and now it is 5; restore that" in refused.stderr


def test_a_signal_ends_it_with_a_sentence_and_the_same_command_goes_on(trained: Path, tmp_path: Path):
    output = tmp_path / "x.jsonl"
    arguments = ("--k=2", f"--output={output}", "rollout.max_batch_size=2")  # a prompt at a time
    process = start("chord_megatron.cli", "evaluate", trained / "run", *arguments, env={"HOLD_AT_CALL": "2"})
    wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") == 2, process)
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert outcome.code == 130 and outcome.stdout == ""
    assert outcome.stderr.endswith("ended by SIGINT; the same command goes on from what is drawn\n")
    assert "Traceback" not in outcome.stderr
    drawn = output.read_bytes()
    assert evaluate(trained / "run", *arguments)["num_completions"] == 14
    assert output.read_bytes().startswith(drawn) and output.read_bytes().count(b"\n") == 8


def test_an_export_and_a_checkpoint_are_evaluated_as_their_run(trained: Path, tmp_path: Path):
    expected = evaluation_of(trained, 4)["eval_reward_mean"]
    for folder in ("checkpoints", "hf"):
        found = evaluate(trained / "run" / folder / "step_4", f"--output={tmp_path / folder}.jsonl")
        assert found["metrics"]["reward_mean"]["value"] == expected


def test_a_model_by_itself(trained: Path, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a run: columns and rewards as defaults and overrides have them; rows name their sources."""
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(trained / "run" / "hf" / "step_4", tmp_path / "model")
    rows = [{"question": f"{n} + {n} =", "answer": str(2 * n), "data_source": "ab"[n % 2]} for n in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ("data.prompt_column=question", "model.dtype=float32", "rollout.max_completion_length=6")
    found = evaluate(model, "sums.jsonl", *overrides)
    assert {name: each["num_prompts"] for name, each in found["sources"].items()} == {"a": 3, "b": 2}
    assert (found["step"], found["passes"], found["metrics"]["pass@1"]["interval"]) == (None, "accuracy >= 1", "wilson")
    file = Path(found["completions"])
    assert file.parent == Path("evaluations") and file.name.startswith("model-sums.jsonl-k1-t0-")
    drawn, other = file.read_bytes(), evaluate(model, "sums.jsonl", *overrides, "rollout.max_completion_length=5")
    assert other["completions"] != str(file) and Path(other["completions"]).is_file()
    assert evaluate(model, "sums.jsonl", *overrides) == found and file.read_bytes() == drawn
    table = succeeded(run_here("evaluate", model, "sums.jsonl", *overrides)).stdout
    assert "by source" in table and "pass@1" in table


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--k=4", "--temperature=0"), "draws the same completion each time"),
        (("--temperature=0.001",), "train.eval_temperature=0.001: must be 0 (greedy) or at least 0.01"),
        (("none.jsonl",), "cannot read none.jsonl"),
        (("a.jsonl", "b.jsonl"), "PROMPTS is one data file or data set, and these are 2: a.jsonl, b.jsonl"),
        (
            ("parallel.tensor_model_parallel_size=2",),
            "1 process cannot hold a model on tensor x pipeline = 2 x 1 = 2 ranks",
        ),
        (("rewards.reward_funcs=[accurcy]",), "did you mean 'accuracy'?"),
    ],
)
def test_one_sentence(trained: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str):
    outcome = run_here("evaluate", trained / "run", *arguments, f"--output={tmp_path / 'x.jsonl'}")
    assert outcome.code == 2 and outcome.stdout == "" and len(outcome.errors) == 1
    assert sentence in outcome.errors[0]
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.distributed
def test_two_processes_draw_what_one_does(trained: Path, tmp_path: Path):
    arguments = ("--k=2", "--temperature=0.8", "--json")
    one = evaluate(trained / "run", *arguments[:2], f"--output={tmp_path / 'one.jsonl'}")
    for name, layout in (("dp", ()), ("tp", ("parallel.tensor_model_parallel_size=2",))):
        output = tmp_path / f"{name}.jsonl"
        command = ("evaluate", trained / "run", *arguments, f"--output={output}", *layout, "--nproc-per-node", "2")
        outcome = succeeded(finish(start("chord_megatron.cli", *command)))
        assert json.loads(outcome.stdout)["metrics"] == one["metrics"]
        assert read_lines(output)[1:] == read_lines(tmp_path / "one.jsonl")[1:]


# Says where it is loaded, and what it is called with.
COUNTED = """
import json, os

def note(**what):
    with open(__file__ + ".notes", "a") as file:
        file.write(json.dumps({"process": os.getpid(), **what}) + "\\n")

note(loaded=True)

def counted(prompts, completions):
    note(prompts=prompts)
    return [0.0] * len(completions)
"""


@pytest.mark.distributed
def test_each_rank_loads_a_reward_function_and_calls_it_with_its_share(trained: Path, tmp_path: Path):
    """As docs/rewards.md has it: prompt i goes to rank i modulo the number of processes, groups are whole."""
    file = tmp_path / "counted.py"
    file.write_text(COUNTED)
    rewards = f"rewards.reward_funcs=['{file}:counted']"
    output = tmp_path / "x.jsonl"
    drawn = ("--k=2", f"--output={output}", rewards, "--nproc-per-node", "2")
    succeeded(finish(start("chord_megatron.cli", "evaluate", trained / "run", *drawn)))
    notes = read_lines(tmp_path / "counted.py.notes")
    assert len([note for note in notes if "loaded" in note]) == len({note["process"] for note in notes}) == 2
    prompts = [line["prompt"] for line in read_lines(output)[1:]]
    shares = [[prompt for prompt in prompts[rank::2] for _ in range(2)] for rank in range(2)]
    assert sorted(note["prompts"] for note in notes if "prompts" in note) == sorted(shares)


def test_several_completions_of_each_held_out_prompt(assets: Path, tmp_path: Path):
    """The run's own evaluation: the mean over all completions, as the command computes it."""
    config = write_config(assets, tmp_path)
    held_out = (f"data.eval_dataset={assets / 'prompts.jsonl'}", "data.num_eval_prompts=3", "train.eval_steps=2")
    drawn = ("train.eval_num_generations=4", "train.eval_temperature=1.0", "train.train_iters=2")
    succeeded(train_here(config, *held_out, *drawn))
    expected = evaluation_of(tmp_path, 2)
    found = evaluate(tmp_path / "run", f"--output={tmp_path / 'x.jsonl'}")
    assert (found["k"], found["num_completions"]) == (4, 12)
    assert found["metrics"]["reward_mean"]["value"] == expected["eval_reward_mean"]
    assert found["metrics"]["response_length_mean"]["value"] == expected["eval_response_length_mean"]


# The reward of an evaluation is a function of how many there were: known beforehand.
SCHEDULED = """
from pathlib import Path
FILE = Path(__file__).with_name("calls")

def scheduled(prompts, completions, references, **columns):
    if not references[0].startswith("held"):
        return [float(index % 2) for index in range(len(completions))]
    calls = int(FILE.read_text()) if FILE.exists() else 0
    FILE.write_text(str(calls + 1))
    return [[0.1, 0.3, 0.6, 0.5, 0.6, 0.2, 0.1][calls]] * len(completions)
"""


def scheduled(assets: Path, root: Path) -> tuple[Path, tuple[str, ...]]:
    (root / "scheduled.py").write_text(SCHEDULED)
    (root / "held.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "held 2"}\n')
    return write_config(assets, root), (
        f"rewards.reward_funcs=['{root / 'scheduled.py'}:scheduled']",
        f"data.eval_dataset={root / 'held.jsonl'}",
        "train.eval_steps=1",
        "train.save_steps=1",
        "train.save_total_limit=1",
        "train.keep_best=true",
    )


def test_the_best_checkpoint_is_kept_and_patience_ends_the_run(assets: Path, tmp_path: Path):
    """Evaluations at 0, 1, 2, ...: 0.1, 0.3, 0.6, 0.5, 0.6: the best is step 2, and 4 is the second that is no better.

    Killed in between: the run stops after step 3 and goes on.
    """
    config, overrides = scheduled(assets, tmp_path)
    run = tmp_path / "run"
    succeeded(train_here(config, *overrides, "train.train_iters=3"))
    assert (run / "checkpoints" / "best").read_text() == "step_2\n"
    patient = (*overrides, "train.train_iters=6", "train.early_stopping_patience=2")
    outcome = succeeded(train_here(config, *patient))
    sentence = "stopped early at step 4: 2 evaluations in a row were not above the eval_reward_mean of step 2, 0.6"
    assert f"{sentence}\nbest: {run / 'hf' / 'step_2'}, by its eval_reward_mean\n" in outcome.stdout
    for folder in ("checkpoints", "hf"):
        assert sorted(path.name for path in (run / folder).glob("step_*")) == ["step_2", "step_4"]
    assert (run / "checkpoints" / "best").read_text() == "step_2\n"
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == [0, 1, 2, 3]
    again = succeeded(train_here(config, *patient))
    assert again.stdout == f"{run} is finished: {sentence}; raise train.early_stopping_patience to train on\n"
    on = succeeded(train_here(config, *overrides, "train.train_iters=6", "train.early_stopping_patience=4"))
    assert "stopped early at step 6" not in on.stdout
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == [*range(6)]
    rewards = [line["eval_reward_mean"] for line in read_metrics(run) if "loss" not in line]
    assert rewards == [0.1, 0.3, 0.6, 0.5, 0.6, 0.2, 0.1]
    assert sorted(path.name for path in (run / "hf").glob("step_*")) == ["step_2", "step_6"]
    assert math.isclose(evaluation_of(tmp_path, 2)["eval_reward_mean"] or 0, 0.6)


def test_what_ended_a_run_stands_also_where_its_last_evaluation_is_the_best(assets: Path, tmp_path: Path):
    """Patience is over at step 3, within a generation batch of two steps: the run ends at 4, and is evaluated there."""
    config, overrides = scheduled(assets, tmp_path)
    (tmp_path / "scheduled.py").write_text(SCHEDULED.replace("[0.1, 0.3, 0.6, 0.5, 0.6, 0.2, 0.1]", "[0.3, 0.1, 0.9]"))
    others = (*(o for o in overrides if not o.startswith(("train.keep_best", "train.save", "train.eval_steps"))),)
    batches = ("train.eval_steps=3", "train.save_steps=2", "train.train_iters=6", "grpo.steps_per_generation=2")
    outcome = succeeded(train_here(config, *others, *batches, "train.early_stopping_patience=1"))
    assert "stopped early at step 4: the last evaluation was not above" in outcome.stdout
    rewards = {line["step"]: line["eval_reward_mean"] for line in read_metrics(tmp_path / "run") if "loss" not in line}
    assert rewards == {0: 0.3, 3: 0.1, 4: 0.9}
    assert (tmp_path / "run" / "checkpoints" / "finished").read_text().startswith("6 early_stopping_patience=1\n")


def test_a_run_that_ends_between_its_saves_is_saved_there(assets: Path, tmp_path: Path):
    config, overrides = scheduled(assets, tmp_path)
    unsaved = (*(o for o in overrides if "keep_best" not in o), "train.save_steps=null", "train.train_iters=6")
    outcome = succeeded(train_here(config, *unsaved, "train.early_stopping_patience=1"))
    assert "stopped early at step 3: the last evaluation was not above" in outcome.stdout
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_3\n"
    assert (tmp_path / "run" / "hf" / "step_3" / "model.safetensors").is_file()


def test_a_budget_of_tokens_ends_the_run_also_where_it_was_stopped_in_between(assets: Path, tmp_path: Path):
    config = write_config(assets, tmp_path)
    held_out = (f"data.eval_dataset={assets / 'prompts.jsonl'}", "data.num_eval_prompts=2", "train.eval_steps=4")
    whole = (*held_out, "train.train_iters=6", f"train.output_dir={tmp_path / 'whole'}")
    succeeded(train_here(config, *whole))
    steps = [line for line in read_metrics(tmp_path / "whole") if "loss" in line]
    spent = [line["num_rollout_tokens"] + line["num_expert_tokens"] for line in steps]
    budget = f"train.max_loss_tokens={sum(spent[:3])}"
    succeeded(train_here(config, *held_out, budget, "train.train_iters=2"))
    outcome = succeeded(train_here(config, *held_out, budget, "train.train_iters=6"))
    sentence = f"stopped early at step 3: {sum(spent[:3]):,} tokens had a loss, of {sum(spent[:3]):,} allowed"
    assert sentence in outcome.stdout
    lines = read_metrics(tmp_path / "run")
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in steps[:3]]
    assert [line["step"] for line in lines if "loss" not in line] == [0, 2, 3]
    assert (tmp_path / "run" / "hf" / "step_3" / "model.safetensors").is_file()
    again = succeeded(train_here(config, *held_out, budget, "train.train_iters=6"))
    assert again.stdout == f"{tmp_path / 'run'} is finished: {sentence}; raise train.max_loss_tokens to train on\n"
