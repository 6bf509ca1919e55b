"""tools/test_releases.py: which interpreters it takes, what it counts, and what it says where there is none."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """Not imported by its name, which the tests of the releases have too."""
    spec = importlib.util.spec_from_file_location("test_releases_tool", ROOT / "tools" / "test_releases.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any Python: an empty folder on PATH, none of pyenv's versions."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path


def test_interpreters_come_from_uv_pyenv_and_path(tool: ModuleType, nowhere: Path):
    of_uv = script(nowhere / "uv's" / "python", "echo 3 11")
    script(nowhere / "bin" / "uv", f'case "$*" in *3.11) echo "{of_uv}";; *) exit 2;; esac')
    of_pyenv = script(nowhere / "pyenv" / "versions" / "3.12.9" / "bin" / "python3.12", "echo 3 12")
    of_path = script(nowhere / "bin" / "python3.13", "echo 3 13")
    assert tool.find_pythons() == {(3, 11): str(of_uv), (3, 12): str(of_pyenv), (3, 13): str(of_path)}


def test_what_does_not_run_is_no_interpreter(tool: ModuleType, nowhere: Path):
    script(nowhere / "bin" / "python3.12", "echo 'pyenv: python3.12: command not found' >&2", "exit 127")
    script(nowhere / "bin" / "python3.13", "echo \"No module named 'ensurepip'\" >&2", "exit 1")
    (nowhere / "bin" / "python3").symlink_to(nowhere / "nothing")
    assert tool.find_pythons() == {}


@pytest.mark.parametrize(
    ("release", "pythons", "chosen"),
    [
        ("0.16.1", [(3, 13), (3, 11), (3, 12)], "3.11"),
        ("0.16.1", [(3, 13)], "3.13"),
        ("0.19.2", [(3, 13), (3, 11), (3, 12)], "3.12"),
        ("0.19.2", [(3, 11), (3, 14)], None),
    ],
)
def test_the_oldest_python_that_fits(
    tool: ModuleType, release: str, pythons: list[tuple[int, int]], chosen: str | None
):
    assert tool.choose_python(release, {version: f"{version[0]}.{version[1]}" for version in pythons}) == chosen


def test_without_a_python_the_last_lines_say_so_and_it_is_no_failure(nowhere: Path):
    run = [sys.executable, str(ROOT / "tools" / "test_releases.py")]
    done = subprocess.run(run, capture_output=True, text=True, env=dict(os.environ))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"\n+#{72}\n#  NOT TESTED: megatron-core 0\.19\.2\n(#  .*\n)+#{72}\n", done.stdout)


def test_tests_are_counted_by_part(tool: ModuleType):
    report = """<testsuites><testsuite>
        <testcase classname="tests.e2e.test_resume" name="a"/>
        <testcase classname="tests.e2e.test_resume" name="b"><failure/></testcase>
        <testcase classname="tests.distributed.test_models" name="c"><skipped/></testcase>
        <testcase classname="tests.distributed.test_upstream_layers" name="d"><error/></testcase>
        <testcase classname="" name="tests.distributed.test_head_memory"><error/></testcase>
    </testsuite></testsuites>"""
    counts = tool.count(ElementTree.ElementTree(ElementTree.fromstring(report)))
    assert counts["resume"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert counts["models"] == {"passed": 0, "failed": 1, "skipped": 1}
    assert counts["head"] == {"passed": 0, "failed": 1, "skipped": 0}
    assert counts["exactness"] == {"passed": 0, "failed": 0, "skipped": 0}
    assert list(counts) == list(tool.PARTS)


def test_the_table_has_numbers_alone_where_all_passed(tool: ModuleType):
    def row(release: str, python: str, **resume: int) -> dict[str, object]:
        parts = {part: dict.fromkeys(tool.KINDS, 0) for part in tool.PARTS} | {"resume": resume}
        return {"megatron-core": release, "python": python, "parts": parts}

    rows = [
        row("0.16.1", "3.11.7", passed=9, failed=0, skipped=0),
        row("0.19.2", "3.12.1", passed=7, failed=1, skipped=1),
    ]
    lines = tool.table(rows).splitlines()
    assert lines[:2] == ["| | 0.16.1, Python 3.11 | 0.19.2, Python 3.12 |", "|---|---|---|"]
    assert "| resume | 9 | 7 passed, 1 failed, 1 skipped |" in lines
    assert len(lines) == 2 + len(tool.PARTS)


def test_it_names_files_that_are_there_and_the_torch_of_the_makefile(tool: ModuleType):
    assert [file for files in tool.PARTS.values() for file in files if not (ROOT / "tests" / file).is_file()] == []
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"torch==[\d.]+", makefile)) == set(
        re.findall(r"torch==[\d.]+", Path(tool.__file__).read_text())
    )


@pytest.mark.parametrize("failing", [None, "test", "test-latest"])
def test_continuous_integration_runs_both_ends_and_fails_where_one_does(failing: str | None, tmp_path: Path):
    script(tmp_path / "make", 'echo "make $1"', f'[ "$1" != "{failing}" ]')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([str(ROOT / ".ci" / "run")], capture_output=True, text=True, env=environment)
    said = ["make test", "make test-latest"]
    assert done.stdout.splitlines() == said + ([f"FAILED: make {failing}"] if failing else [])
    assert done.returncode == (1 if failing else 0)
