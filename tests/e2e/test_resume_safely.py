"""What a run that is started again finds, refuses, says and leaves alone; and what it says of a full disk."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
from harness import (
    files_below,
    finish,
    read_lines,
    read_metrics,
    run_here,
    start,
    succeeded,
    train_here,
    weight_bytes,
    write_config,
    write_rows,
)

from chord_megatron.tracking.run_lock import held

pytestmark = [pytest.mark.attack, pytest.mark.e2e]


@pytest.fixture(scope="module")
def finished(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints at 2 and 4."""
    base = tmp_path_factory.mktemp("finished")
    succeeded(train_here(write_config(assets, base), "train.train_iters=4"))
    return base / "run"


@pytest.fixture
def run(finished: Path, config: Path, tmp_path: Path) -> Path:
    """A copy of it, where `config` sends its output."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refusal(config: Path, *overrides: str) -> str:
    outcome = train_here(config, *overrides)
    assert outcome.code == 2, outcome.stderr[-2000:]
    [error] = outcome.errors
    assert outcome.stderr == f"{error}\n"
    return error.removeprefix("error: ")


def test_a_lost_pointer_loses_nothing(run: Path, config: Path):
    for name in ("latest", "finished"):
        (run / "checkpoints" / name).unlink()
    before = {name: value for name, value in files_below(run).items() if "step_" in name}

    outcome = succeeded(train_here(config, "train.train_iters=6"))

    assert f"checkpoints/latest is missing; step_4 is the newest complete checkpoint in {run}\n" in outcome.stdout
    assert f"resuming {run} at step 4; since then train.train_iters 4 -> 6\n" in outcome.stdout
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 3, 4, 5]
    assert {name: files_below(run)[name] for name in before} == before


def test_a_first_save_that_was_killed_before_its_export_is_made_up_for(run: Path, config: Path):
    """The checkpoint is complete; neither the export nor the pointer is there."""
    weights = weight_bytes(run, 4)
    shutil.rmtree(run / "hf")
    shutil.rmtree(run / "checkpoints" / "step_2")
    for name in ("latest", "finished"):
        (run / "checkpoints" / name).unlink()

    outcome = succeeded(train_here(config, "train.train_iters=4", "train.save_steps=4"))

    assert f"model: {run / 'hf' / 'step_4'}\n" in outcome.stdout
    assert weight_bytes(run, 4) == weights
    assert (run / "checkpoints" / "latest").read_text() == "step_4\n"


def test_a_run_that_is_taken_back_keeps_what_was_newer(run: Path, config: Path):
    (run / "checkpoints" / "latest").write_text("step_2\n", encoding="utf-8")
    (run / "checkpoints" / "finished").unlink()
    newer = {name: files_below(run / name / "step_4") for name in ("checkpoints", "hf")}
    weights = weight_bytes(run, 4)

    outcome = succeeded(train_here(config, "train.train_iters=4", "train.save_total_limit=1"))

    kept = ("checkpoints/step_4.set-aside", "hf/step_4.set-aside")
    logs = tuple(f"{name}.jsonl.set-aside" for name in ("metrics", "completions", "experts"))
    assert f"newer than step 2, and kept: {', '.join((*kept, *logs))}\n" in outcome.stdout
    assert [line["step"] for line in read_lines(run / logs[0])] == [0, 1, 2, 3]
    assert [files_below(run / name) for name in kept] == [*newer.values()]
    assert weight_bytes(run, 4) == weights
    assert sorted(path.name for path in (run / "hf").iterdir()) == ["step_4", "step_4.set-aside"]


def test_checkpoints_that_are_gone_are_no_new_run(run: Path, config: Path):
    shutil.rmtree(run / "checkpoints")
    before = files_below(run)
    assert refusal(config, "train.train_iters=4") == (
        f"{run} holds hf/step_2 and no complete checkpoint; restore one, or choose another train.output_dir"
    )
    assert files_below(run) == before


def test_what_changed_is_said(run: Path, config: Path):
    outcome = succeeded(
        train_here(config, "train.train_iters=6", "optimizer.lr=5e-4", "rollout.temperature=0.9", "train.save_steps=3")
    )
    assert (
        f"resuming {run} at step 4; since then rollout.temperature 1.0 -> 0.9, optimizer.lr 0.001 -> 0.0005, "
        "train.train_iters 4 -> 6, train.save_steps 2 -> 3\n"
    ) in outcome.stdout


@pytest.mark.parametrize(
    ("override", "before"),
    [
        ("model.dtype=bfloat16", "float32"),
        ("optimizer.use_distributed_optimizer=true", "false"),
        ("data.prompt_format=text", "chat"),
        ("chord.chord_sft_max_length=63", "64"),
    ],
)
def test_what_may_not_change_is_refused_by_its_key(override: str, before: str, run: Path, config: Path):
    key, now = override.split("=")
    files = files_below(run)
    assert refusal(config, "train.train_iters=6", override) == (
        f"{run} holds a run with {key}={before}, but this one has {now}; restore it, or choose another train.output_dir"
    )
    assert files_below(run) == files


def test_before_its_first_step_a_run_may_become_any_other(config: Path, assets: Path, tmp_path: Path):
    assert train_here(config, f"rewards.reward_funcs=[{assets}/rewards.py:raises]").code == 2
    assert (tmp_path / "run" / "config.yaml").exists()
    succeeded(train_here(config, "train.train_iters=1", "train.seed=3", "data.max_prompt_length=47"))


@pytest.mark.parametrize("name", ["prompts", "experts"])
def test_other_data_of_the_same_size_are_refused(name: str, config: Path, assets: Path, tmp_path: Path):
    key = {"prompts": "data.dataset", "experts": "chord.chord_sft_dataset"}[name]
    rows = read_lines(assets / f"{name}.jsonl")
    path = write_rows(tmp_path / f"{name}.jsonl", rows)
    succeeded(train_here(config, "train.train_iters=2", f"{key}={path}"))

    write_rows(path, [*rows[:-1], {**rows[-1], "answer": "another"}])
    assert refusal(config, "train.train_iters=4", f"{key}={path}") == (
        f"{key}={path} has other rows than when the run began; restore them, or choose another train.output_dir"
    )
    state_file = tmp_path / "run" / "checkpoints" / "step_2" / "state.json"
    document = json.loads(state_file.read_text(encoding="utf-8"))
    del document["state"]["data"]  # as before there were fingerprints
    state_file.write_text(json.dumps(document), encoding="utf-8")
    succeeded(train_here(config, "train.train_iters=4", f"{key}={path}"))


# A full disk


@contextmanager
def files_at_most(nbytes: int) -> Iterator[None]:
    """The operating system refuses to make files larger, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def a_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[object]:
    shutil.rmtree(run)
    run.touch()
    return nullcontext()


def not_ours_to_write(run: Path, monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[object]:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != run and access(path, mode))
    return nullcontext()


def in_use(run: Path, monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[object]:
    return held(run)


def without_a_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[object]:
    shutil.rmtree(run / "checkpoints")
    return nullcontext()


def as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[object]:
    return nullcontext()


DIRECTORIES = {
    "a file": (a_file, (), "{run} is a file; choose another train.output_dir"),
    "not ours to write": (not_ours_to_write, (), "{run} cannot be written to; choose another train.output_dir"),
    "in use": (in_use, (), "{run} is in use by process "),
    "of another configuration": (as_it_was, ("train.seed=7",), "{run} holds a run with train.seed=0, but "),
    "without a checkpoint": (without_a_checkpoint, (), "{run} holds hf/step_2 and no complete checkpoint; "),
    "amid a generation": (
        as_it_was,
        ("grpo.num_iterations=3", "train.save_steps=3"),
        "the checkpoint of step 4 lies inside a generation batch of ",
    ),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_validate_says_what_train_would(case: str, run: Path, config: Path, monkeypatch: pytest.MonkeyPatch):
    spoil, overrides, beginning = DIRECTORIES[case]
    overrides = ("train.train_iters=6", *overrides)
    with spoil(run, monkeypatch):
        before = files_below(run)
        outcome = run_here("validate", config, *overrides)
        assert files_below(run) == before
        assert outcome.code == 2
        assert outcome.stderr == f"error: {refusal(config, *overrides)}\n"
        assert outcome.stderr.startswith(f"error: {beginning.format(run=run)}")


def test_validate_makes_nothing(run: Path, config: Path, tmp_path: Path):
    """Of a run that goes on, and of a new one; and several nodes, each of which checks, are one run."""
    before = files_below(run)
    succeeded(run_here("validate", config, "train.train_iters=6"))
    assert files_below(run) == before
    succeeded(run_here("validate", config, f"train.output_dir={tmp_path}/a/new/one"))
    assert not (tmp_path / "a").exists()
    with held(run):
        succeeded(run_here("validate", config, "train.train_iters=6", "--nnodes", "2"))


# The largest file that may be, and which one is then too large.
TOO_LARGE = {
    "configuration": (1_000, "config.yaml"),
    "completions": (6_000, "completions.jsonl"),
    "metrics": (6_000, "metrics.jsonl"),
    "export": (100_000, "hf/step_2"),
    "checkpoint": (200_000, "checkpoints/step_2"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_a_file_that_cannot_grow_is_named_and_the_next_run_goes_on(case: str, config: Path, tmp_path: Path):
    limit, name = TOO_LARGE[case]
    logged = {"metrics": "tracking.log_completions=0", "completions": "rollout.max_completion_length=40"}
    is_log = case in logged  # over four steps, a line of which has more bytes than the other file's
    overrides = (logged[case], "train.save_steps=4", "train.train_iters=4") if is_log else ("train.train_iters=2",)
    with files_at_most(limit):
        error = refusal(config, *overrides)
    assert error == (
        f"{tmp_path / 'run' / name} cannot be written (File too large); make room, and start the same command again"
    )
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.rglob("*.tmp")]
    succeeded(train_here(config, *overrides))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [*range(4 if is_log else 2)]


@pytest.mark.distributed
def test_two_ranks_say_once_that_a_checkpoint_cannot_be_written(config: Path, tmp_path: Path):
    arguments = ("chord_megatron.cli", "train", config, "train.train_iters=2", "--nproc-per-node", "2")
    with files_at_most(200_000):
        outcome = finish(start(*arguments))
    assert outcome.code == 2
    assert outcome.errors == [
        f"error: {tmp_path / 'run' / 'checkpoints' / 'step_2'} cannot be written (File too large); make room, and "
        "start the same command again"
    ]
    assert "Traceback" not in outcome.stderr
    succeeded(finish(start(*arguments)))
