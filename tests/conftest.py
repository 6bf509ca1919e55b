"""For all tests: one compute thread a process, folders that are made once a run, and the numbers printed at its end."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes run at a time
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the launcher sets it

MakeOnce = Callable[[str, Callable[[Path], object]], Path]
Measure = Callable[[str, float | str], None]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """The folder of a name, which a function fills once a test run, whichever worker of xdist wants it first.

    Not to be written to.
    """
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    shared.mkdir(exist_ok=True)

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path, unfinished = shared / name, shared / f"{name}.unfinished"
        with FileLock(shared / f"{name}.lock"):
            if not path.exists():
                unfinished.mkdir(exist_ok=True)
                make(unfinished)
                unfinished.rename(path)
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_models(make_once: MakeOnce) -> Callable[..., Path]:
    """`tiny_families.write_model` into a folder of the run's."""
    from tiny_families import write_model  # imports transformers

    def folder(name: str, **options: object) -> Path:
        label = ", ".join([name, *(f"{key}={value}" for key, value in options.items())])
        return make_once(label, partial(write_model, name=name, **options))

    return folder


@pytest.fixture
def measure(record_property: Callable[[str, object], None]) -> Measure:
    """Tells a number: of fractional ones the largest of all tests is printed after them, of counts the sum.

    Or a text, which is printed.
    """
    return lambda title, value: record_property("measured", (title, value))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured, which xdist's workers send with their reports."""
    measured: dict[str, list[float | str]] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", "") == "call":
            for title, value in (value for name, value in report.user_properties if name == "measured"):
                measured.setdefault(title, []).append(value)
    if measured:
        terminalreporter.section("measured: the largest of each, the sum of counts")
    for title, values in measured.items():
        terminalreporter.write_line(f"{title}: {_shown(values)}")


def _shown(values: list[float | str]) -> str:
    counts = [value for value in values if isinstance(value, int)]
    numbers = [value for value in values if isinstance(value, float)]
    if counts:
        return f"{sum(counts):,}"
    return f"{max(numbers):.2g}" if numbers else ", ".join(sorted({str(value) for value in values}))
