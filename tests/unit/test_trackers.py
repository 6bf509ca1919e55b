"""Trackers in the background: what they are sent, what of it is new to them, and what a run does when they fail."""

from __future__ import annotations

import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

from chord_megatron.config import Config, TrackerName
from chord_megatron.planning.secrets import check_secrets
from chord_megatron.system.errors import UserError
from chord_megatron.system.files import read_json_lines
from chord_megatron.system.secrets import without_secrets, without_secrets_in
from chord_megatron.tracking.run_log import RunLog
from chord_megatron.tracking.trackers import background, opening
from chord_megatron.tracking.trackers.background import BackgroundTracker
from chord_megatron.tracking.trackers.memory import Memory
from chord_megatron.tracking.trackers.opening import refuse_missing_packages
from chord_megatron.tracking.trackers.prometheus import Prometheus, exposition, gauge_name
from chord_megatron.tracking.trackers.protocol import LibraryTracker, TrackedRun

REMEDY = "training goes on, metrics.jsonl has everything, and tracker_errors counts what fails"


@dataclass
class Service:
    """A tracker's server, which may be down, slow, or refuse a key; `calls` is what reached it."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    opened: list[str | None] = field(default_factory=list)
    is_down: bool = False
    may_go_on: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.may_go_on.set()

    def open_tracker(self, run: TrackedRun) -> LibraryTracker:
        self.answer()
        self.opened.append(run.run_id)
        return Client(self, run.run_id or f"run-{len(self.opened)}")

    def answer(self) -> None:
        self.may_go_on.wait()
        if self.is_down:
            raise ConnectionError("no route to\nhost")


class Client:
    """Its library."""

    place: str | None = "https://tracker/run"

    def __init__(self, service: Service, run_id: str | None) -> None:
        self.service, self.run_id = service, run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.service.answer()
        self.service.calls.append(("scalars", step, dict(values)))

    def text(self, step: int, tag: str, text: str) -> None:
        self.service.answer()
        self.service.calls.append(("text", step, tag, text))

    def table(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.service.answer()
        self.service.calls.append(("table", step, tag, list(rows)))

    def artifact(self, path: Path) -> None:
        self.service.answer()
        self.service.calls.append(("artifact", path.name))

    def close(self, *, failed: bool) -> None:
        self.service.answer()
        self.service.calls.append(("close", failed))


def opened(
    tmp_path: Path, service: Service, said: list[str], memory: Memory | None = None, name: str = "wandb"
) -> BackgroundTracker:
    path = tmp_path / "trackers" / f"{name}.json"
    return BackgroundTracker(name, TrackedRun(tmp_path), service.open_tracker, memory or Memory(path), say=said.append)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to that in 10 s")


def test_what_is_told_arrives_in_order(tmp_path: Path) -> None:
    service, said = Service(), list[str]()
    tracker = opened(tmp_path, service, said)
    tracker.scalars(0, {"train/loss": 0.5})
    tracker.table(0, "completions", [{"completion": "4"}])
    tracker.text(1, "findings", "all is well")
    tracker.artifact(tmp_path / "report.html")
    tracker.close(failed=False)
    assert service.calls == [
        ("scalars", 0, {"train/loss": 0.5}),
        ("table", 0, "completions", [{"completion": "4"}]),
        ("text", 1, "findings", "all is well"),
        ("artifact", "report.html"),
        ("close", False),
    ]
    assert (said, tracker.errors) == (["wandb: https://tracker/run"], 0)
    assert json.loads((tmp_path / "trackers" / "wandb.json").read_text()) == {
        "run_id": "run-1",
        "sent": {"train/loss": 0, "completions": 0},
    }


def test_a_run_that_goes_on_sends_what_is_new(tmp_path: Path) -> None:
    """Steps that are taken again, behind the evaluation that is not, are there already."""
    service = Service()
    tracker = opened(tmp_path, service, [])
    for step in range(4):
        tracker.scalars(step, {"eval/reward_mean": step / 4})
        tracker.scalars(step, {"train/loss": 1.0 * step})
        tracker.table(step, "completions", [{"completion": step}])
    tracker.close(failed=True)
    service.calls.clear()
    again = opened(tmp_path, service, [], Memory.read(tmp_path / "trackers" / "wandb.json"))
    for step in range(2, 5):
        again.scalars(step, {"train/loss": 10.0 * step, "train/kl": 0.25})
        again.table(step, "completions", [{"completion": step}])
        again.scalars(step + 1, {"eval/reward_mean": 1.0})
    again.close(failed=False)
    assert service.opened == [None, "run-1"]
    assert service.calls == [
        ("scalars", 2, {"train/kl": 0.25}),
        ("scalars", 3, {"train/kl": 0.25}),
        ("scalars", 4, {"eval/reward_mean": 1.0}),
        ("scalars", 4, {"train/loss": 40.0, "train/kl": 0.25}),
        ("table", 4, "completions", [{"completion": 4}]),
        ("scalars", 5, {"eval/reward_mean": 1.0}),
        ("close", False),
    ]


def test_an_outage_is_said_once_and_counted(tmp_path: Path) -> None:
    service, said = Service(), list[str]()
    tracker = opened(tmp_path, service, said)
    tracker.scalars(0, {"train/loss": 0.5})
    wait_until(lambda: len(service.calls) == 1)
    service.is_down = True
    for step in (1, 2, 3):
        tracker.scalars(step, {"train/loss": 0.5})
    wait_until(lambda: tracker.errors == 3)
    service.is_down = False
    tracker.scalars(4, {"train/loss": 0.25})
    tracker.close(failed=False)
    assert service.calls[1:] == [("scalars", 4, {"train/loss": 0.25}), ("close", False)]
    assert said == [
        "wandb: https://tracker/run",
        f"wandb says no route to host; {REMEDY}",
        "wandb: 3 calls failed in all",
    ]


def test_what_did_not_arrive_is_sent_by_the_run_that_goes_on(tmp_path: Path) -> None:
    service = Service()
    tracker = opened(tmp_path, service, [])
    tracker.scalars(0, {"train/loss": 0.5})
    wait_until(lambda: len(service.calls) == 1)
    service.is_down = True
    tracker.scalars(1, {"train/loss": 0.5})
    tracker.close(failed=True)
    assert Memory.read(tmp_path / "trackers" / "wandb.json").sent == {"train/loss": 0}


def test_one_that_refuses_is_opened_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, said = Service(is_down=True), list[str]()
    tracker = opened(tmp_path, service, said)
    tracker.scalars(0, {"train/loss": 0.5})
    wait_until(lambda: tracker.errors == 2)  # to open it, and the point
    service.is_down = False
    tracker.scalars(1, {"train/loss": 0.5})
    wait_until(lambda: tracker.errors == 3)  # not tried again so soon
    monkeypatch.setattr(background, "SECONDS_TO_OPEN_AGAIN", 0.0)
    tracker.scalars(2, {"train/loss": 0.5})
    tracker.close(failed=False)
    assert service.calls == [("scalars", 2, {"train/loss": 0.5}), ("close", False)]


def test_one_that_hangs_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "MOST_WAITING", 4)
    monkeypatch.setattr(background, "SECONDS_TO_CLOSE", 0.2)
    service, said = Service(), list[str]()
    service.may_go_on.clear()
    tracker = opened(tmp_path, service, said)
    wait_until(tracker._calls.empty)  # it hangs in opening
    for step in range(10):
        tracker.scalars(step, {"train/loss": 0.5})
    assert tracker.errors == 6
    tracker.close(failed=False)
    assert said == [f"wandb is 4 calls behind; {REMEDY}", "wandb: 7 calls failed in all"]
    service.may_go_on.set()
    wait_until(lambda: len(service.calls) == 4)


def test_one_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "SECONDS_TO_ANSWER", 0.0)
    service, said = Service(), list[str]()
    service.may_go_on.clear()
    tracker = opened(tmp_path, service, said)
    wait_until(tracker._calls.empty)
    tracker.scalars(0, {"train/loss": 0.5})
    tracker.scalars(1, {"train/loss": 0.5})
    assert said == [f"wandb has not answered for 0 s; {REMEDY}"]
    service.may_go_on.set()
    tracker.close(failed=False)


def test_the_log_goes_on_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(is_down=True)
    monkeypatch.setattr(opening, "open_remote", lambda name, run: service.open_tracker(run))
    stream = io.StringIO()
    with RunLog(tmp_path, train_iters=2, report_to=("mlflow",), stream=stream) as log:
        log.log_step({"step": 0, "loss": 0.5})
        wait_until(lambda: sum(tracker.errors for tracker in log._trackers) == 2)  # type: ignore[attr-defined]
        log.log_step({"step": 1, "loss": 0.25})
    assert [*read_json_lines(tmp_path / "metrics.jsonl")][1] == {"step": 1, "loss": 0.25, "tracker_errors": 2}
    assert stream.getvalue().count("mlflow says no route to host") == 1


def test_a_run_that_goes_back_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    monkeypatch.setattr(opening, "open_remote", lambda name, run: service.open_tracker(run))

    def log_steps(resume_step: int | None, *, goes_back: bool = False) -> None:
        tracked = TrackedRun(tmp_path, goes_back=goes_back)
        stream = io.StringIO()
        with RunLog(
            tmp_path, train_iters=9, report_to=("wandb",), resume_step=resume_step, tracked=tracked, stream=stream
        ) as log:
            log.log_step({"step": resume_step or 0, "loss": 0.5})

    log_steps(None)
    log_steps(1)
    log_steps(1, goes_back=True)
    assert service.opened == [None, "run-1", None]
    assert [call[:2] for call in service.calls if call[0] == "scalars"] == [("scalars", n) for n in (0, 1, 1)]


@pytest.mark.parametrize("text", ["[]", '{"sent": {}, "run_id": 1}', '{"sent": {"a": "1"}}', '{"run_id": "a"}', "{"])
def test_a_damaged_memory_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wandb.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"wandb\.json .*remove it, and the tracker shows a new run"):
        Memory.read(path)


def test_each_name_has_its_file() -> None:
    for name in get_args(TrackerName):
        assert (Path(opening.__file__).parent / f"{name}.py").exists()


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_tracker").mkdir()  # as a library leaves a folder of its name
    monkeypatch.syspath_prepend(str(tmp_path))
    refuse_missing_packages(["tensorboard"])
    with pytest.raises(UserError) as error:
        refuse_missing_packages(["tensorboard", "no_such_tracker"])
    assert str(error.value) == (
        "tracking.report_to names no_such_tracker, which is not installed; run pip install "
        "'chord_megatron[no_such_tracker]', or leave it out"
    )


def test_tensorboard_takes_the_same_bytes_as_before(tmp_path: Path) -> None:
    """A version, a start, and one event for each record."""
    with RunLog(tmp_path, train_iters=2, report_to=("tensorboard",), resume_step=1, stream=io.StringIO()) as log:
        log.log_step({"step": 1, "loss": 0.5})
        log.log_completions(1, [{"completion": "4"}])
        log.track_text(1, "findings", "x")
        log.track_artifact(tmp_path / "metrics.jsonl")
    (file,) = (tmp_path / "tensorboard").iterdir()
    version, start, point = RawEventFileLoader(str(file)).Load()
    # field numbers of event.proto: step 2, file_version 3, summary 5, session_log 7; the first 9 bytes are the time
    assert version[9:] == b"\x1a\x0dbrain.Event:2"
    assert start[9:] == b"\x10\x01\x3a\x02\x08\x01"
    assert point[9:] == b"\x10\x01\x2a\x13\x0a\x11\x0a\x0atrain/loss\x15\x00\x00\x00\x3f"


def test_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("CHORD_SERVER_TOKEN", "hunter2")  # too short to be looked for
    text = "401 for 0123456789abcdef at https://me:pass@tracker:5000/api, hunter2"
    assert without_secrets(text) == "401 for *** at https://***@tracker:5000/api, hunter2"
    config = {"data": {"dataset": "hf://datasets/a@b", "tags": ["0123456789abcdef", 1]}, "none": None}
    assert without_secrets_in(config) == {"data": {"dataset": "hf://datasets/a@b", "tags": ["***", 1]}, "none": None}


def test_a_password_in_the_configuration_is_refused() -> None:
    groups: dict[str, Any] = {
        "model": {"path": "model"},
        "train": {"output_dir": "out", "global_batch_size": 8, "train_iters": 1},
        "tracking": {"uri": "https://me:secret@tracker"},
    }
    with pytest.raises(UserError) as error:
        check_secrets(Config.model_validate(groups))
    assert str(error.value) == (
        "tracking.uri has a user or password in an address, and the run would write it down; leave it out, and give "
        "it in the environment"
    )
    groups["tracking"]["uri"] = "https://tracker"
    check_secrets(Config.model_validate(groups))


def test_prometheus_is_told_the_last_step(free_port: int) -> None:
    server = Prometheus("127.0.0.1", free_port)
    server.scalars(3, {"train/loss": 0.5, "expert_p/0.0": 0.125})
    server.scalars(4, {"train/loss": 0.25})
    assert server.address == f"http://127.0.0.1:{free_port}/metrics"
    with urllib.request.urlopen(server.address, timeout=5) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert answer.read().decode() == (
            "# TYPE chord_step gauge\nchord_step 4\n"
            "# TYPE chord_train_loss gauge\nchord_train_loss 0.25\n"
            "# TYPE chord_expert_p_0_0 gauge\nchord_expert_p_0_0 0.125\n"
        )
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{free_port}/secret", timeout=5)
    with pytest.raises(UserError, match=f"port {free_port} of 127.0.0.1 is taken"):
        Prometheus("127.0.0.1", free_port)
    server.close(failed=False)
    Prometheus("127.0.0.1", free_port).close(failed=False)


def test_prometheus_names() -> None:
    assert gauge_name('a"}\nb{c="é') == "chord_a___b_c___"
    assert exposition({"chord_loss": 1e-30}) == "# TYPE chord_loss gauge\nchord_loss 1e-30\n"


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port
