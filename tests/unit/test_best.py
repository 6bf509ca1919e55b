"""Which saved step is the best, what points to it, and how a run that ended early is marked."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from chord_megatron.config import TrainConfig
from chord_megatron.tracking.best import best_step, evaluations_since_best
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.tracking.run_log import RunLog
from chord_megatron.training.ending import early_end, limits

REWARDS = {0: 0.1, 10: 0.5, 20: 0.7, 30: 0.7, 40: 0.6}


def test_the_best_is_the_first_of_the_highest():
    assert best_step(REWARDS, [10, 20, 30, 40, 50]) == 20
    assert best_step(REWARDS, [30, 40]) == 30
    assert best_step(REWARDS, [50]) is None and best_step({}, [10]) is None


def test_evaluations_since_the_best_are_those_that_were_no_better():
    assert evaluations_since_best(REWARDS) == 2  # at 30 as good as at 20 is not better
    assert evaluations_since_best({0: 0.1}) == 0 and evaluations_since_best({}) == 0
    assert evaluations_since_best({0: -1.0, 1: -2.0, 2: -3.0, 3: -0.5}) == 0


def save(run_dir: RunDir, step: int) -> None:
    for folder in (run_dir.checkpoint(step), run_dir.hf(step)):
        folder.mkdir(parents=True)
        (folder / "weights").touch()


def there(run_dir: RunDir) -> list[str]:
    return sorted(path.name for path in run_dir.path.glob("hf/*"))


def test_the_best_is_kept_beside_the_newest(tmp_path: Path):
    run_dir, rewards = RunDir(tmp_path), {0: 0.0}
    kept = []
    for step, reward in ((1, 0.3), (2, 0.5), (3, 0.4), (4, 0.6), (5, 0.1)):
        save(run_dir, step)
        run_dir.publish(step, 1, rewards)
        rewards[step] = reward  # an evaluation comes behind the save of its step
        run_dir.mark_best(rewards)
        kept.append((there(run_dir), run_dir.best_step()))
    assert kept == [
        (["step_1"], 1),
        (["step_1", "step_2"], 2),  # until the next save
        (["step_2", "step_3"], 2),
        (["step_2", "step_4"], 4),
        (["step_4", "step_5"], 4),
    ]
    assert (tmp_path / "checkpoints" / "best").read_text() == "step_4\n"


def test_without_keep_best_the_newest_are_kept_alone(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    for step in (1, 2):
        save(run_dir, step)
        run_dir.publish(step, 1)
    assert there(run_dir) == ["step_2"] and run_dir.best_step() is None


def test_a_pointer_to_what_is_set_aside_goes(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    for step in (1, 2):
        save(run_dir, step)
    assert run_dir.mark_best({1: 0.1, 2: 0.2}) == 2
    run_dir.set_aside(1)
    assert run_dir.best_step() is None
    assert run_dir.mark_best({1: 0.1}) == run_dir.best_step() == 1
    assert run_dir.mark_best({}) is None and not (tmp_path / "checkpoints" / "best").exists()


@pytest.mark.parametrize("content", [b"", b"step_\n", b"../../x\n", b"\xff\n", b"step_7\n"])
def test_a_damaged_pointer_names_nothing(tmp_path: Path, content: bytes):
    run_dir = RunDir(tmp_path)
    save(run_dir, 1)
    (tmp_path / "checkpoints" / "best").write_bytes(content)
    assert run_dir.best_step() is None
    assert run_dir.mark_best({1: 0.5}) == run_dir.best_step() == 1


def test_a_run_that_ended_early_is_finished_for_its_patience_alone(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    save(run_dir, 1)
    run_dir.mark_finished(300, early=("early_stopping_patience", 3, "stopped early at step 120: for a reason"))
    assert run_dir.ending(300, {"early_stopping_patience": 3}) == (
        f"{tmp_path} is finished: stopped early at step 120: for a reason; raise train.early_stopping_patience to "
        "train on"
    )
    others = (
        (300, {"early_stopping_patience": 4}),
        (300, {"max_loss_tokens": 3}),
        (400, {"early_stopping_patience": 3}),
    )
    assert [run_dir.ending(*settings) for settings in others] == [None] * 3
    run_dir.mark_finished(300)
    assert (
        run_dir.ending(300, {"early_stopping_patience": 3})
        == f"{tmp_path} is finished; raise train.train_iters to train on"
    )


def test_the_log_knows_the_rewards_of_evaluations_also_after_a_resume(tmp_path: Path):
    def log(resume_step: int | None) -> RunLog:
        return RunLog(tmp_path, train_iters=9, report_to=(), resume_step=resume_step, stream=io.StringIO())

    with log(None) as first:
        for step, reward in ((0, 0.25), (2, None), (4, 0.5), (6, 0.75)):
            first.log_eval(step, {"eval_reward_mean": reward})
        assert first.rewards == {0: 0.25, 4: 0.5, 6: 0.75}
    with log(4) as resumed:
        assert resumed.rewards == {0: 0.25, 4: 0.5}


@pytest.mark.parametrize(
    ("step", "tokens", "key"),
    [(50, 999, "early_stopping_patience"), (50, 1000, "max_loss_tokens"), (60, 1000, None)],
)
def test_a_run_ends_by_the_limit_that_it_reaches(step: int, tokens: int, key: str | None):
    train = TrainConfig(output_dir="x", train_iters=60, early_stopping_patience=2, max_loss_tokens=1000)
    assert limits(train) == {"early_stopping_patience": 2, "max_loss_tokens": 1000}
    ended = early_end(train, step, REWARDS, tokens)
    assert (ended and ended.key) == key and (ended is None or ended.limit == limits(train)[ended.key])


def test_a_run_goes_on_below_its_limits():
    train = TrainConfig(output_dir="x", train_iters=60, early_stopping_patience=3, max_loss_tokens=1000)
    assert early_end(train, 50, REWARDS, 999) is None and early_end(train, 50, {}, 0) is None
    assert limits(TrainConfig(output_dir="x", train_iters=60)) == {}
