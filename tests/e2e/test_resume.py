"""Stopped and started again, a run is the uninterrupted one: bitwise on the same layout, to 1e-5 on another."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import (
    files_below,
    finish,
    kill,
    read_lines,
    read_metrics,
    start,
    succeeded,
    train_here,
    train_on_forks,
    train_on_two,
    wait_until,
    weight_bytes,
    weights,
    write_config,
)
from tiny_model import write_tiny_model

from chord_megatron.checkpoints import conversion

pytestmark = [pytest.mark.attack, pytest.mark.e2e, pytest.mark.distributed]

TENSOR_PARALLEL = ("parallel.tensor_model_parallel_size=2", "grpo.beta=0.05", "train.save_total_limit=2")
Overrides = tuple[str, ...]
SHARDED_OPTIMIZER: Overrides = ("optimizer.use_distributed_optimizer=true", "train.train_iters=4")


@dataclass(frozen=True)
class RunFiles:
    """A run and the overrides that send its output below `root`."""

    config: Path
    root: Path

    @property
    def path(self) -> Path:
        return self.root / "run"

    @property
    def recording(self) -> Path:
        return self.root / "rollouts.jsonl"

    @property
    def overrides(self) -> tuple[str, str]:
        return f"train.output_dir={self.path}", f"rollout.record_to={self.recording}"

    def copy_to(self, root: Path) -> RunFiles:
        shutil.copytree(self.root, root)
        return RunFiles(self.config, root)

    def rewind_to(self, step: int) -> None:
        """As if it had been stopped some time after the checkpoint of `step`."""
        (self.path / "checkpoints" / "latest").write_text(f"step_{step}\n", encoding="utf-8")
        (self.path / "checkpoints" / "finished").unlink()


@pytest.fixture(scope="module")
def tensor_parallel(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """Six steps at TP 2 without an interruption."""
    return finished_run(assets, tmp_path_factory.mktemp("tensor_parallel"), *TENSOR_PARALLEL)


@pytest.fixture(scope="module")
def sharded_optimizer(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """Four steps at DP 2 with the distributed optimizer."""
    return finished_run(assets, tmp_path_factory.mktemp("sharded_optimizer"), *SHARDED_OPTIMIZER)


@pytest.fixture(scope="module", params=["dense", "experts"])
def sharded(
    request: pytest.FixtureRequest,
    sharded_optimizer: RunFiles,
    assets: Path,
    make_once: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RunFiles, Overrides]:
    """That run, or one of a model with experts, two on each process; and the overrides that made it."""
    if request.param == "dense":
        return sharded_optimizer, SHARDED_OPTIMIZER
    model = make_once("tiny model with experts", partial(write_tiny_model, with_experts=True))
    overrides = (*SHARDED_OPTIMIZER, f"model.path={model}", "parallel.expert_model_parallel_size=2")
    return finished_run(assets, tmp_path_factory.mktemp("expert_parallel"), *overrides), overrides


@pytest.fixture(scope="module")
def killed(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """The TP 2 run, killed in its sixth step: its last checkpoint is that of four."""
    base = tmp_path_factory.mktemp("killed")
    run = RunFiles(write_config(assets, base), base / "files")
    arguments = ("train", run.config, *run.overrides, *TENSOR_PARALLEL, "--nproc-per-node", "2")
    process = start("chord_megatron.cli", *arguments, env={"HOLD_AT_CALL": "6"})
    metrics = run.path / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) == 5, process)
    alive = kill(process)
    assert not alive, "the workers outlived their launcher, and would have written into the resumed run"
    assert finish(process).code == -signal.SIGKILL
    return run


def finished_run(assets: Path, base: Path, *overrides: str) -> RunFiles:
    run = RunFiles(write_config(assets, base), base / "files")
    succeeded(train_on_forks(run.config, *run.overrides, *overrides))
    return run


def losses(run: RunFiles) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in read_metrics(run.path)], dtype=torch.float64)


def assert_same_run(run: RunFiles, expected: RunFiles, step: int) -> None:
    """Bitwise: metrics, completions, experts, sampled tokens and the weights after `step` steps."""
    assert read_metrics(run.path) == read_metrics(expected.path)
    for name in ("completions.jsonl", "experts.jsonl", "../rollouts.jsonl"):
        assert (run.path / name).read_bytes() == (expected.path / name).read_bytes(), name
    assert weight_bytes(run.path, step) == weight_bytes(expected.path, step)


def assert_close_run(run: RunFiles, expected: RunFiles, step: int) -> None:
    """The same samples, losses within 1e-5 and weights within a hundredth of an optimizer step (lr 1e-3)."""
    tokens = [[line["tokens"] for line in read_lines(files.recording)] for files in (run, expected)]
    assert tokens[0] == tokens[1]
    torch.testing.assert_close(losses(run), losses(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(weights(run.path, step), weights(expected.path, step), rtol=0, atol=1e-5)


def test_a_killed_run_resumes_bitwise(tensor_parallel: RunFiles, killed: RunFiles, tmp_path: Path):
    assert [line["step"] for line in read_lines(killed.path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert (killed.path / "checkpoints" / "latest").read_text() == "step_4\n"
    run = killed.copy_to(tmp_path / "files")

    outcome = succeeded(train_on_two(run.config, *run.overrides, *TENSOR_PARALLEL))

    assert f"resuming {run.path} at step 4" in outcome.stdout
    assert_same_run(run, tensor_parallel, step=6)


def test_a_killed_run_resumes_on_one_process(tensor_parallel: RunFiles, killed: RunFiles, tmp_path: Path):
    run = killed.copy_to(tmp_path / "files")
    # What a kill in the middle of a write leaves.
    for name in ("checkpoints/step_6.partial", "hf/step_6.partial"):
        (run.path / name).mkdir()
        (run.path / name / "model.safetensors").write_bytes(b"torn")
    for path in (run.path / "metrics.jsonl", run.recording):
        with path.open("ab") as file:
            file.write(b'{"step": 5, "loss": 0.')
    one_process = (*run.overrides, *TENSOR_PARALLEL, "parallel.tensor_model_parallel_size=1")

    succeeded(train_here(run.config, *one_process))
    assert_close_run(run, tensor_parallel, step=6)

    before = files_below(run.path)
    outcome = succeeded(train_here(run.config, *one_process))
    assert outcome.stdout == f"{run.path} is finished; raise train.train_iters to train on\n"
    assert files_below(run.path) == before

    succeeded(train_here(run.config, *one_process, "train.train_iters=7"))
    assert [line["step"] for line in read_metrics(run.path)] == [0, 1, 2, 3, 4, 5, 6]


def test_saved_at_tp_2_and_at_pp_2_the_weights_are_the_same_bytes(tensor_parallel: RunFiles, tmp_path: Path):
    """Exported by the run and converted from its checkpoint. A step at learning rate 1e-30 changes no weight."""
    expected = weight_bytes(tensor_parallel.path, 6)
    run = tensor_parallel.copy_to(tmp_path / "files")
    pipeline = (
        "parallel.pipeline_model_parallel_size=2",
        "optimizer.lr=1e-30",
        "train.train_iters=7",
        "grpo.beta=0.05",
    )
    succeeded(train_on_forks(run.config, *run.overrides, *pipeline))
    assert weight_bytes(run.path, 7) == expected
    for step in (6, 7):
        converted = tmp_path / f"converted_{step}"
        conversion.megatron_to_hf(run.path / "checkpoints" / f"step_{step}", converted)
        assert (converted / "model.safetensors").read_bytes() == expected


def test_old_checkpoints_are_pruned(tensor_parallel: RunFiles):
    for folder, others in (("checkpoints", {"latest", "finished"}), ("hf", set())):
        assert {path.name for path in (tensor_parallel.path / folder).iterdir()} == {"step_4", "step_6"} | others


def test_the_distributed_optimizer_resumes_bitwise(sharded: tuple[RunFiles, Overrides], tmp_path: Path):
    finished, overrides = sharded
    run = finished.copy_to(tmp_path / "files")
    run.rewind_to(2)
    succeeded(train_on_forks(run.config, *run.overrides, *overrides))
    assert_same_run(run, finished, step=4)


def test_the_distributed_optimizer_resumes_on_one_process(sharded: tuple[RunFiles, Overrides], tmp_path: Path):
    finished, overrides = sharded
    run = finished.copy_to(tmp_path / "files")
    run.rewind_to(2)
    succeeded(train_here(run.config, *run.overrides, *overrides, "parallel.expert_model_parallel_size=1"))
    assert_close_run(run, finished, step=4)


def test_a_finished_run_says_so_without_starting_workers(sharded_optimizer: RunFiles, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("chord_megatron.cli.train.run_processes", lambda *_, **__: pytest.fail("started workers"))
    before = files_below(sharded_optimizer.root)
    overrides = (*sharded_optimizer.overrides, *SHARDED_OPTIMIZER)
    outcome = succeeded(train_here(sharded_optimizer.config, *overrides, "--nproc-per-node", "2"))
    assert outcome.stdout == f"{sharded_optimizer.path} is finished; raise train.train_iters to train on\n"
    assert files_below(sharded_optimizer.root) == before
