"""What a run leaves behind, read back from disk."""

from __future__ import annotations

import io
import json
import math
import os
import platform
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chord_megatron.system.atomic import atomic_write
from chord_megatron.system.errors import UserError
from chord_megatron.system.files import JsonLines, read_json_lines
from chord_megatron.system.work import Work
from chord_megatron.tracking.plots import running_mean
from chord_megatron.tracking.progress import RECENT_STEPS, step_fields
from chord_megatron.tracking.progress import ProgressLine as Progress
from chord_megatron.tracking.run_log import RunLog
from chord_megatron.tracking.step_metrics import ExpertRow
from chord_megatron.tracking.summary import EvalPoint, load_history, print_summary, summarize_history
from chord_megatron.tracking.timers import PhaseTimer

FULL_STEP = {
    "step": 11,
    "loss": 0.5,
    "loss_rollout": 0.0125,
    "loss_expert": 0.75,
    "mu": 0.35,
    "phi_mean": 0.125,
    "reward_mean": 0.4125,
    "entropy": 0.83,
    "kl": None,
    "tokens_per_second": 12345.0,
    "time_rollout": 6.0,
    "time_reward": 0.5,
    "time_log_probs": 0.0,
    "time_train": 3.0,
    "time_sync": 0.25,
    "time_step": 10.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step_metrics(step: int, **changes: Any) -> dict[str, Any]:
    return {**FULL_STEP, "step": step, "num_rollout_tokens": 100, "num_expert_tokens": 20, **changes}


def open_log(run_dir: Path, resume_step: int | None = None, report_to: tuple[str, ...] = ()) -> RunLog:
    return RunLog(run_dir, train_iters=10, report_to=report_to, resume_step=resume_step, stream=io.StringIO())


def lines(path: Path) -> list[dict[str, Any]]:
    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=reject) for line in path.read_text("utf-8").splitlines()]


def write_run(run_dir: Path, steps: int) -> None:
    """Steps 0 .. steps - 1 with two completions each, an evaluation before each even step and a last one."""
    with open_log(run_dir) as log:
        for step in range(steps):
            if step % 2 == 0:
                log.log_eval(step, {"eval_reward_mean": step / 10})
            log.log_step(step_metrics(step))
            log.log_completions(step, [{"completion": "a"}, {"completion": "b"}])
        log.log_eval(steps, {"eval_reward_mean": steps / 10})


def kinds(run_dir: Path) -> list[tuple[str, int]]:
    records = lines(run_dir / "metrics.jsonl")
    return [("step" if "loss" in record else "eval", record["step"]) for record in records]


def test_lines_are_on_disk_before_close(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.log_eval(0, {"eval_reward_mean": 0.25})
    log.log_step({"step": 0, "loss": 1.5, "kl": None})
    log.log_completions(0, [{"completion": "4\u2028é\ud83d", "rewards": {"accuracy": math.nan}}])
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 0, "eval_reward_mean": 0.25},
        {"step": 0, "loss": 1.5, "kl": None},
    ]
    assert list(read_json_lines(tmp_path / "completions.jsonl")) == [
        {"step": 0, "completion": "4\u2028é\ud83d", "rewards": {"accuracy": None}}
    ]
    log.close()


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.log_step({"step": 0, "loss": math.nan, "grad_norm": math.inf, "entropy": -math.inf, "mu": 0.5})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 0, "loss": None, "grad_norm": None, "entropy": None, "mu": 0.5}
    ]


def test_resume_drops_what_is_written_again(tmp_path: Path) -> None:
    write_run(tmp_path, 5)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 5, "loss": 0.1, "note": "é'.encode()[:-1])  # SIGKILL within a character
    with (tmp_path / "completions.jsonl").open("a") as file:
        file.write('{"step": 5, "compl')
    with open_log(tmp_path, resume_step=2) as log:
        assert log.last_eval_step == 2
        log.log_step(step_metrics(2))
    assert kinds(tmp_path) == [("eval", 0), ("step", 0), ("step", 1), ("eval", 2), ("step", 2)]
    assert [row["step"] for row in lines(tmp_path / "completions.jsonl")] == [0, 0, 1, 1]
    assert not list(tmp_path.glob("*.tmp"))


def test_experts_and_what_they_lost_since_they_were_first_seen(tmp_path: Path) -> None:
    """Also across a resumption, which drops the lines that it writes again."""
    with open_log(tmp_path) as log:
        log.log_experts(0, [ExpertRow(7, -1.0, 0.5), ExpertRow(3, math.nan, math.nan)])
        log.log_experts(1, [ExpertRow(7, -1.25, 0.25), ExpertRow(3, -2.0, 0.125)])
        log.log_experts(2, [ExpertRow(9, -3.0, 0.5)])
    assert lines(tmp_path / "experts.jsonl") == [
        {"step": 0, "id": 7, "log_prob": -1.0, "phi": 0.5, "shift": 0.0},
        {"step": 0, "id": 3, "log_prob": None, "phi": None, "shift": None},
        {"step": 1, "id": 7, "log_prob": -1.25, "phi": 0.25, "shift": 0.25},
        {"step": 1, "id": 3, "log_prob": -2.0, "phi": 0.125, "shift": 0.0},
        {"step": 2, "id": 9, "log_prob": -3.0, "phi": 0.5, "shift": 0.0},
    ]
    with open_log(tmp_path, resume_step=2) as log:
        log.log_experts(2, [ExpertRow(9, -2.5, 0.5), ExpertRow(3, -1.5, 0.5), ExpertRow(7, -1.5, 0.5)])
    again = lines(tmp_path / "experts.jsonl")[4:]
    assert [(row["id"], row["shift"]) for row in again] == [(9, 0.0), (3, -0.5), (7, 0.5)]


@pytest.mark.parametrize("row", ['{"step": 0}', '{"step": 0, "id": 1.5, "log_prob": 0.5}', '{"step": 0, "id": 1}'])
def test_a_damaged_line_of_experts_is_named(tmp_path: Path, row: str) -> None:
    write_run(tmp_path, 2)
    (tmp_path / "experts.jsonl").write_text(row.replace('"id": 1}', '"id": 1, "log_prob": "x"}') + "\n")
    with pytest.raises(
        UserError,
        match=r"line 1 of .*experts.jsonl is no expert row .*; remove that line",
    ):
        open_log(tmp_path, resume_step=2)


def test_resume_keeps_everything_before_it(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    open_log(tmp_path, resume_step=3).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_at_zero_starts_over(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    with open_log(tmp_path, resume_step=0) as log:
        assert log.last_eval_step == 0
    assert kinds(tmp_path) == [("eval", 0)]


def test_resume_without_an_earlier_log(tmp_path: Path) -> None:
    with open_log(tmp_path / "run", resume_step=4) as log:
        assert log.last_eval_step is None


def test_new_run_refuses_the_metrics_of_another(tmp_path: Path) -> None:
    write_run(tmp_path, 1)
    with pytest.raises(UserError, match="holds the metrics of another run"):
        open_log(tmp_path)


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1}\n{"step": 1,\n{"step": 2, "loss": 1}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics.jsonl is not a JSON object"):
        list(read_json_lines(path))


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        atomic_write(path, (bytes(1 // n) for n in (1, 0)))
    assert path.read_text() == "old"


def test_json_lines_append(tmp_path: Path) -> None:
    for value in (1, 2):
        file = JsonLines(tmp_path / "rows.jsonl")
        file.write({"value": value})
        file.close()
    assert (tmp_path / "rows.jsonl").read_text() == '{"value": 1}\n{"value": 2}\n'


def test_tensorboard_values_and_purge(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path, report_to=("tensorboard",)) as log:
        for step in range(3):
            log.log_eval(step, {"eval_reward_mean": step / 4})
            log.log_step({"step": step, "loss": 1.0 + step, "kl": None, "entropy": math.nan, "time_step": 2.0})
    with open_log(tmp_path, resume_step=1, report_to=("tensorboard",)) as log:
        log.log_step({"step": 1, "loss": 8.0, "reward/accuracy": 0.5})

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = ["eval/reward_mean", "reward/accuracy", "time/step", "train/loss"]
    assert sorted(events.Tags()["scalars"]) == tags
    read = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    assert read == {
        "eval/reward_mean": [(0, 0.0), (1, 0.25)],
        "reward/accuracy": [(1, 0.5)],
        "time/step": [(0, 2.0)],
        "train/loss": [(0, 1.0), (1, 8.0)],
    }


def test_curves_are_written_by_no_thread(tmp_path: Path) -> None:
    """One that fails prints a traceback of its own, and says so to nobody until something else is written."""
    before = threading.active_count()
    with open_log(tmp_path, report_to=("tensorboard",)) as log:
        log.log_step({"step": 0, "loss": 1.0})
        assert threading.active_count() == before
        (file,) = (tmp_path / "tensorboard").iterdir()
        size = file.stat().st_size
        log.log_step({"step": 1, "loss": 1.0})
        assert file.stat().st_size > size  # at once


def test_curves_that_cannot_grow_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.0)
    file = tmp_path / "tensorboard" / f"events.out.tfevents.1.000000.{platform.node()}.{os.getpid()}"
    file.parent.mkdir()
    file.symlink_to("/dev/full")
    with pytest.raises(UserError) as error:
        open_log(tmp_path, report_to=("tensorboard",))
    assert str(error.value) == (
        f"{file} cannot be written (No space left on device); make room, and start the same command again"
    )


def test_step_line() -> None:
    assert " | ".join(step_fields(FULL_STEP, train_iters=500, eta=4880)) == (
        "step 11 (12 of 500) | ETA 1:21:20 | reward 0.412 | mu 0.350 | phi 0.125"
        " | loss 0.5000 (rollout 0.0125 / expert 0.7500) | entropy 0.830 | 12,345 tokens/s"
        " | 10.0 s/step: rollout 60% reward 5% train 30% sync 2%"
    )


def test_step_line_without_rollouts() -> None:
    metrics = {
        "step": 0,
        "loss": 2.0,
        "loss_rollout": None,
        "loss_expert": 2.0,
        "reward_mean": None,
        "kl": 0.5,
    }
    fields = step_fields({**metrics, "skipped_steps": 1, "reward_errors": 3}, train_iters=1, eta=None)
    expected = "step 0 (1 of 1) | loss 2.0000 (expert 2.0000) | KL 0.5000 | skipped 1 | reward errors 3"
    assert " | ".join(fields) == expected


def test_eta_follows_the_recent_steps() -> None:
    stream = io.StringIO()
    progress = Progress(train_iters=100, stream=stream)
    progress.update({"step": 0, "loss": 0.0, "time_step": 1000.0})
    for step in range(1, RECENT_STEPS + 1):
        progress.update({"step": step, "loss": 0.0, "time_step": 0.5})
    assert "| ETA 39.5 s |" in stream.getvalue().splitlines()[-1]  # 79 steps to go


def test_plain_output_has_no_control_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    with RunLog(tmp_path, train_iters=2, report_to=(), stream=stream) as log:
        log.log_step(step_metrics(0))
        log.message("[bold] saved :smile: to /a/path/that/is/longer/than/forty/characters")
        log.log_eval(1, {"eval_reward_mean": 0.25, "eval_response_length_mean": None})
    printed = stream.getvalue().split("\n")
    assert printed[0].startswith("step 0 (1 of 2) | ETA 10.0 s | ") and printed[0].endswith("sync 2%")
    assert printed[1:] == [
        "[bold] saved :smile: to /a/path/that/is/longer/than/forty/characters",
        "eval at step 1 | reward_mean 0.25",
        "",
    ]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_a_terminal_keeps_each_step_whole_above_the_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns: broken between fields, and what is a bar is gone at the end."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    path = "/a/path/that/is/longer/than/what/is/left/of/the/line/and/that/one/wants/to/copy/as/it/stands"
    with RunLog(tmp_path, train_iters=2, report_to=(), stream=stream) as log:
        log.log_eval(0, {f"eval_{name}_mean": 0.25 for name in ("reward", "response_length", "another", "third")})
        log.waiting(Work("completions", 3, 8), "rollout of step 0: 3 of 8 completions" + ", far" * 20, is_due=False)
        log.log_step(step_metrics(0))
        log.message(f"the checkpoint of step 1, which is the newest that the run has so far, is saved in {path}")
        log.log_step(step_metrics(1, loss_rollout=-0.5))
    text = stream.getvalue()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    step = [
        "step 0 (1 of 2) | ETA 10.0 s | reward 0.412 | mu 0.350 | phi 0.125",
        "    loss 0.5000 (rollout 0.0125 / expert 0.7500) | entropy 0.830",
        "    12,345 tokens/s | 10.0 s/step: rollout 60% reward 5% train 30% sync 2%",
    ]
    assert [line for line in lines if line and "━" not in line] == [
        "eval at step 0 | reward_mean 0.25 | response_length_mean 0.25",
        "    another_mean 0.25 | third_mean 0.25",
        *step,
        "the checkpoint of step 1, which is the newest that the run has so far, is saved",
        "in",
        path,  # longer than the line, and in one piece all the same
        "step 1 (2 of 2) | ETA 0.0 s | reward 0.412 | mu 0.350 | phi 0.125",
        "    loss 0.5000 (rollout -0.5000 / expert 0.7500) | entropy 0.830",
        step[2],
    ]
    bars = [line for line in lines if "rollout of step 0: 3 of 8 completions" in line]
    assert {(line.index(" "), len(line), line[-1]) for line in bars} == {(16, 80, "…")}  # whole, beside what fits
    assert "1 of 2 steps, ETA 10.0 s" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


def test_in_a_file_a_wait_is_a_line_when_it_is_due(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path, train_iters=2, report_to=(), stream=stream) as log:
        log.waiting(Work(), "rollout of step 0: 9 s so far", is_due=False)
        log.waiting(Work(), "rollout of step 0: 10 s so far", is_due=True)
    assert stream.getvalue() == "rollout of step 0: 10 s so far\n"


def test_summary(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for step, reward in enumerate((0.1, 0.9, 0.4)):
            log.log_eval(step, {"eval_reward_mean": reward})
            seconds = 10.0 * (step + 1)
            log.log_step(step_metrics(step, time_step=seconds, tokens_per_second=600.0 / seconds))
        log.log_step(step_metrics(3, loss=math.nan, reward_mean=None, tokens_per_second=None))
    summary = summarize_history(load_history(tmp_path))
    assert (summary.steps, summary.rollout_tokens, summary.expert_tokens) == (4, 400, 80)
    assert (summary.first_eval, summary.best_eval) == (EvalPoint(0, 0.1), EvalPoint(1, 0.9))
    assert summary.last_eval == EvalPoint(2, 0.4)
    assert (summary.last_reward, summary.last_loss, summary.step_seconds) == (0.4125, 0.5, 70.0)
    assert summary.tokens_per_second == pytest.approx(1800 / 60)  # tokens over seconds
    assert summary.phase_seconds == {
        "rollout": 24.0,
        "reward": 2.0,
        "log_probs": 0.0,
        "train": 12.0,
        "sync": 1.0,
    }


def test_print_summary(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    stream = io.StringIO()
    print_summary(tmp_path, Console(file=stream, width=120))
    text = stream.getvalue()
    assert tmp_path.name in text
    assert "0.2000 (step 2)" in text and "rollout 60%, reward 5%, train 30%, sync 2%" in text


def test_running_mean() -> None:
    values = [1.0, 2.0, math.nan, 6.0]
    assert running_mean(values, reach=1) == pytest.approx([1.5, 1.5, math.nan, 6.0], nan_ok=True)


def test_phase_timer() -> None:
    readings = iter([0.0, 1.0, 3.0, 10.0, 14.0, 20.0, 30.0])
    synchronized: list[None] = []
    timer = PhaseTimer(lambda: synchronized.append(None), clock=lambda: next(readings))
    with timer("step"):  # 0 .. 20
        with timer("rollout"):  # 1 .. 3
            pass
        with timer("rollout"):  # 10 .. 14
            pass
    assert len(synchronized) == 6
    zeros = {"time_reward": 0.0, "time_log_probs": 0.0, "time_train": 0.0, "time_sync": 0.0}
    assert timer.times() == {"time_rollout": 6.0, "time_step": 20.0, **zeros}
    assert timer.times() == {"time_rollout": 0.0, "time_step": 0.0, **zeros}


def test_phase_timer_rejects_an_unknown_phase() -> None:
    with pytest.raises(AssertionError, match="unknown phase 'rollouts'"), PhaseTimer()("rollouts"):
        pass
