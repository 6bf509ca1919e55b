"""What an evaluation is of, and its file of completions: what goes on, what is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from chord_megatron.config import load_config
from chord_megatron.evaluation.records import Answered, Drawn, EvaluationFile, name_by_settings
from chord_megatron.evaluation.results import metrics_of, summary
from chord_megatron.evaluation.statistics import wilson
from chord_megatron.evaluation.tables import tables
from chord_megatron.evaluation.target import Target, default_output, evaluation_config, find_target
from chord_megatron.planning.evaluations import (
    check_evaluations,
    check_generations,
    for_evaluation,
    with_fitting_lengths,
)
from chord_megatron.system.errors import UserError

SETTINGS: dict[str, Any] = {"model": "m", "k": 2, "num_prompts": 3, "reward_funcs": ["accuracy"], "temperature": 1.0}


def drawn(reward: float | None, answer: str | None = None, tokens: int = 3) -> Drawn:
    return Drawn(
        completion=f"é {reward}",
        answer=answer,
        reward=reward,
        rewards={"accuracy": reward},
        reward_errors=0,
        tokens=tokens,
        finish_reason="length" if tokens > 8 else "stop",
    )


def row(index: int, *completions: Drawn, source: str = "a") -> Answered:
    return Answered(prompt_id=index, source=source, prompt="p", reference="1", completions=[*completions])


ROWS = [
    row(0, drawn(1.0, "1"), drawn(1.0, "1", tokens=9)),
    row(1, drawn(0.0, "2"), drawn(1.0, "1"), source="b"),
    row(2, drawn(0.0, "2"), drawn(None), source="b"),
]


def test_a_file_goes_on_where_it_ended(tmp_path: Path):
    path = tmp_path / "new" / "x.jsonl"
    with EvaluationFile(path, SETTINGS) as file:
        assert file.rows == []
        file.append(ROWS[:2])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"prompt_id": 2, "sou')  # killed here
    with EvaluationFile(path, SETTINGS) as file:
        assert file.rows == ROWS[:2] and path.read_bytes() == whole
        file.append(ROWS[2:])
    with EvaluationFile(path, SETTINGS) as file:
        assert file.rows == ROWS


@pytest.mark.parametrize("content", [b"", b'{"set', b'{"settings": {"model": "m"'])
def test_a_file_that_was_hardly_begun_begins_anew(tmp_path: Path, content: bytes):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with EvaluationFile(path, SETTINGS) as file:
        assert file.rows == []
    assert json.loads(path.read_text()) == {"settings": SETTINGS}


def refusal(path: Path, settings: dict[str, Any]) -> str:
    before = path.read_bytes()
    with pytest.raises(UserError) as error:
        EvaluationFile(path, settings)
    assert path.read_bytes() == before
    return str(error.value)


def test_other_settings_are_refused(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    EvaluationFile(path, SETTINGS).__exit__(None, None, None)
    assert refusal(path, SETTINGS | {"temperature": 0.6}) == (
        f"{path} holds completions drawn with temperature=1.0, and now it is 0.6; restore that, or name another "
        "--output"
    )
    assert "with model='m', and now it is 'n'" in refusal(path, SETTINGS | {"model": "n"})


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"{}\n", b"[1]\n", b'{"settings": 5}\n', b"[" * 10**5 + b"\n"])
def test_files_of_others_are_left_alone(tmp_path: Path, content: bytes):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    assert refusal(path, SETTINGS) == f"{path} is not a file of completions; name another --output"


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"\xff",
        b'{"prompt_id": 0, "source": "a", "prompt": "p", "reference": "1", "completions": []}',
        ROWS[0].model_dump_json().replace("accuracy", "format").encode(),
        ROWS[0].model_dump_json().replace('"tokens":3', '"tokens":-3').encode(),
        ROWS[0].model_dump_json().replace('"reward":1.0', '"reward":"1"').encode(),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes):
    path = tmp_path / "x.jsonl"
    EvaluationFile(path, SETTINGS).__exit__(None, None, None)
    path.write_bytes(path.read_bytes() + line + b"\n")
    assert refusal(path, SETTINGS) == f"line 2 of {path} is not a prompt with its completions; name another --output"


def test_two_at_once_are_refused(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    with EvaluationFile(path, SETTINGS):
        assert "is being written by another evaluation" in refusal(path, SETTINGS)


def test_metrics_by_hand():
    found = metrics_of(ROWS, ("accuracy", 1.0))
    values = {name: each and each.value for name, each in found.items()}
    assert values == {
        "reward_mean": 3 / 5,  # the unscorable one is left out
        "pass@1": (1 + 1 / 2 + 0) / 3,
        "pass@2": 2 / 3,
        "maj@2": (1 + 1 / 2 + 0) / 3,
        "response_length_mean": 24 / 6,
        "truncated_fraction": 1 / 6,
    }
    assert found["pass@2"] is not None and found["pass@2"][1:] == (*wilson(2, 3), "wilson")
    assert found["pass@1"] is not None and found["pass@1"].interval == "bootstrap"


def test_the_summary_is_json_and_the_table_escapes_what_it_shows():
    hostile = [row(3, drawn(1.0), drawn(0.0), source="[red]x[/red]")]
    found = summary([*ROWS, *hostile], ("accuracy", 1.0))
    assert json.loads(json.dumps(found)) == found
    assert (found["num_prompts"], found["num_completions"], found["unscorable_completions"]) == (4, 8, 1)
    assert {name: each["num_prompts"] for name, each in found["sources"].items()} == {"a": 1, "b": 2, "[red]x[/red]": 1}
    from rich.console import Console

    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    asked = {"model": "m", "prompts": "[b]p", "k": 2, "temperature": 1.0, "completions": "x.jsonl"}
    console.print(tables(found | asked))
    text = console.export_text()
    assert "[red]x[/red]" in text and "m on 4 prompts of [b]p, 2 completions of each, temperature 1" in text


def test_at_80_columns_no_number_is_broken(capsys: pytest.CaptureFixture[str]):
    """By source there are two tables; an equal pass@1 stands in none."""
    from rich.console import Console

    rows = [
        row(2 * n + at, drawn(float(n % 3 > at), "1"), drawn(float(n % 7 == 0), "2"), source=source)
        for n in range(40)
        for at, source in enumerate(("openai/gsm8k", "HuggingFaceH4/MATH-500"))
    ]
    asked = {"model": "m", "prompts": "p.jsonl", "k": 2, "temperature": 1.0}
    Console(width=80).print(tables(summary(rows, ("accuracy", 1.0)) | asked))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    first, second = text.partition("by source")[2].split("┏")[1:]
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for part in (first, second)
        for line in part.splitlines()
        if "│" in line
    ]
    assert cells == [
        ["openai/gsm8k", "40", "0.4 [0.31, 0.5]", "0.7 [0.55, 0.82]"],
        ["HuggingFaceH4/MATH-500", "40", "0.237 [0.15, 0.34]", "0.425 [0.29, 0.58]"],
        ["openai/gsm8k", "0.4 [0.31, 0.5]", "0 [0, 0]"],
        ["HuggingFaceH4/MATH-500", "0.237 [0.15, 0.34]", "0 [0, 0]"],
    ]
    assert "pass@1" not in first + second and "truncated_fraction" in second


def test_votes_without_answers_are_no_number():
    assert metrics_of([row(0, drawn(1.0), drawn(0.0))], ("accuracy", 1.0))["maj@2"] is None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with two checkpoints, of which the first is the best."""
    root = tmp_path / "run"
    for step in (3, 6):
        folder = root / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True)
        for name in (".metadata", "state.json", "config.json"):
            (folder / name).write_text("{}")
    (root / "checkpoints" / "latest").write_text("step_6\n")
    (root / "checkpoints" / "best").write_text("step_3\n")
    (root / "config.yaml").write_text(
        "model: {path: m}\ndata: {dataset: d.jsonl, eval_dataset: held.jsonl, num_eval_prompts: 5, prompt_column: q}\n"
        "train: {output_dir: run, global_batch_size: 8, train_iters: 6, seed: 0}\n"
    )
    return root


def test_what_is_evaluated(run: Path, tmp_path: Path):
    at = {step: run / "checkpoints" / f"step_{step}" for step in (3, 6)}
    assert find_target(run, None) == find_target(run, "latest") == find_target(run, "6") == Target(at[6], run, 6)
    assert find_target(run, "best") == find_target(run, "3") == Target(at[3], run, 3)
    assert find_target(at[3], None) == Target(at[3], run, 3)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert find_target(model, None) == Target(model, None, None)


def test_what_cannot_be_evaluated(run: Path, tmp_path: Path):
    def refused(path: Path, checkpoint: str | None = None) -> str:
        with pytest.raises(UserError) as error:
            find_target(path, checkpoint)
        return str(error.value)

    assert refused(tmp_path / "none").endswith(
        "is not a directory; name a model's folder, a checkpoint or a run directory"
    )
    (run / "metrics.jsonl").touch()
    assert refused(run / "metrics.jsonl") == f"{run}/metrics.jsonl is a file; give the run's directory, {run}"
    assert refused(run / "config.yaml" / "x").endswith("a checkpoint or a run directory")
    assert refused(run / "checkpoints").endswith(f"name one in it, such as {run / 'checkpoints' / 'step_6'}")
    assert "(3, 6), nor best or latest" in refused(run, "5") and "nor best or latest" in refused(run, "../x")
    assert "is for a run directory" in refused(run / "checkpoints" / "step_3", "best")
    (run / "checkpoints" / "best").unlink()
    assert refused(run, "best").endswith("names no checkpoint; train.keep_best=true keeps one")


def test_a_runs_configuration_is_the_evaluations(run: Path):
    target = find_target(run, None)
    config = evaluation_config(target, None, None, [])
    assert (config.data.eval_dataset, config.data.num_eval_prompts, config.data.prompt_column) == ("held.jsonl", 5, "q")
    assert config.model.path == str(target.model_dir) and config.data.dataset is None
    other = evaluation_config(target, "other.jsonl", None, ["data.prompt_column=p"])
    assert (other.data.eval_dataset, other.data.num_eval_prompts, other.data.prompt_column) == (
        "other.jsonl",
        None,
        "p",
    )
    assert default_output(target, other) == run / "evaluations" / "step_6-other.jsonl-k1-t0.jsonl"
    export = Target(run / "hf" / "step_6", run, 6)
    assert default_output(export, other) == run / "evaluations" / "hf_step_6-other.jsonl-k1-t0.jsonl"


def test_a_default_file_is_of_its_settings():
    named = name_by_settings(Path("e/m-x.jsonl-k2-t1.jsonl"), SETTINGS)
    assert named == name_by_settings(Path("e/m-x.jsonl-k2-t1.jsonl"), dict(reversed(SETTINGS.items())))
    assert named.parent == Path("e") and re.fullmatch(r"m-x\.jsonl-k2-t1-[0-9a-f]{8}\.jsonl", named.name)
    assert named != name_by_settings(Path("e/m-x.jsonl-k2-t1.jsonl"), SETTINGS | {"seed": 5})


def test_a_model_needs_nothing_but_prompts(tmp_path: Path):
    target = Target(tmp_path / 'a "b" ü', None, None)
    config = evaluation_config(target, "x.jsonl", None, [])
    assert config.model.path == str(target.model_dir) and config.data.eval_dataset == "x.jsonl"
    with pytest.raises(UserError, match="name the prompts to evaluate on"):
        evaluation_config(target, None, None, [])


@pytest.mark.parametrize(
    ("overrides", "is_greedy_meant", "temperature"),
    [
        ([], False, 0.0),
        (["train.eval_num_generations=4"], False, 0.9),
        (["train.eval_num_generations=4", "train.eval_temperature=0.5"], False, 0.5),
        (["train.eval_num_generations=4"], True, 0.0),
    ],
)
def test_several_completions_are_drawn_at_the_rollouts_temperature(
    run: Path, overrides: list[str], is_greedy_meant: bool, temperature: float
):
    config = load_config(run / "config.yaml", ["rollout.temperature=0.9", *overrides])
    found = for_evaluation(config, engine=None, is_greedy_meant=is_greedy_meant)
    assert found.train.eval_temperature == temperature


def test_the_engine_of_an_evaluation(run: Path):
    served = ["rollout.engine=vllm", "rollout.vllm_mode=server", "rollout.vllm_servers=[http://a:1]"]
    config = load_config(run / "config.yaml", [*served, "rollout.max_staleness=1", "rollout.record_to=r.jsonl"])
    kept = for_evaluation(config, engine=None, is_greedy_meant=False).rollout
    assert (kept.engine, kept.vllm_servers, kept.max_staleness, kept.record_to) == ("vllm", ["http://a:1"], 0, None)
    here = for_evaluation(config, engine="megatron", is_greedy_meant=False).rollout
    assert (here.engine, here.vllm_mode, here.vllm_servers) == ("megatron", None, None)
    replayed = load_config(run / "config.yaml", ["rollout.engine=replay", "rollout.replay_from=r.jsonl"])
    assert for_evaluation(replayed, engine=None, is_greedy_meant=False).rollout.engine == "megatron"
    colocated = for_evaluation(replayed, engine="vllm", is_greedy_meant=False).rollout
    assert (colocated.engine, colocated.vllm_mode) == ("vllm", "colocate")


@pytest.mark.parametrize(
    ("given", "reads", "lengths", "said"),
    [
        ([], 64, (32, 32), ["rollout.max_completion_length=32", "data.max_prompt_length=32"]),
        ([], 700, (256, 444), ["data.max_prompt_length=444"]),
        ([], 1280, (256, 1024), []),
        (["data.max_prompt_length=48"], 64, (16, 48), ["rollout.max_completion_length=16"]),
        (["rollout.max_completion_length=6"], 64, (6, 58), ["data.max_prompt_length=58"]),
        (["rollout.max_completion_length=64"], 64, (64, 1024), []),  # which is refused, as is what follows
        (["data.max_prompt_length=64"], 64, (256, 64), []),
        (["rollout.max_completion_length=60", "data.max_prompt_length=60"], 64, (60, 60), []),
    ],
)
def test_lengths_that_nobody_gave_fit_the_model(
    tmp_path: Path, given: list[str], reads: int, lengths: tuple[int, int], said: list[str]
):
    config = evaluation_config(Target(tmp_path, None, None), "x.jsonl", None, given)
    found, note = with_fitting_lengths(config, reads)
    assert (found.rollout.max_completion_length, found.data.max_prompt_length) == lengths
    assert note == (f"{' and '.join(said)}, as the model reads {reads} tokens" if said else None)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.keep_best=true"], "train.keep_best goes by evaluations; set train.eval_steps, or remove it"),
        (["train.early_stopping_patience=2"], "train.early_stopping_patience goes by evaluations"),
        (["train.keep_best=true", "train.eval_steps=2"], "set train.save_steps, now null, to a multiple of train.eval"),
        (["train.keep_best=true", "train.eval_steps=2", "train.save_steps=3"], "now 3, to a multiple of train.eval_st"),
        (["train.eval_num_generations=4"], "train.eval_num_generations=4 at train.eval_temperature=0 draws the same"),
    ],
)
def test_what_follows_from_evaluations_needs_them(run: Path, overrides: list[str], sentence: str):
    with pytest.raises(UserError) as error:
        check_evaluations(load_config(run / "config.yaml", overrides))
    assert sentence in str(error.value)


def test_rules_that_are_kept(run: Path):
    kept = ["train.keep_best=true", "train.eval_steps=2", "train.save_steps=4", "train.early_stopping_patience=1"]
    check_evaluations(load_config(run / "config.yaml", kept))
    check_generations(1, 0.0)
    check_generations(8, 0.6)


@pytest.mark.parametrize("override", ["optimizer.lr=0", "train.train_iters=0"])
def test_training_that_learns_nothing_names_the_command(run: Path, override: str):
    with pytest.raises(UserError, match="`chord-megatron evaluate` draws and scores completions without training"):
        load_config(run / "config.yaml", [override])
