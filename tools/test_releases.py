"""Tests what touches Megatron-Core under other releases of it, each in an environment of its own.

    python tools/test_releases.py                        # the newest of constraints.txt, in .venv-latest
    python tools/test_releases.py 0.16.1 0.17.1 0.18.2   # these, each in .venv-RELEASE
    python tools/test_releases.py installed              # what this interpreter has, as it is

Each takes the oldest Python that it runs on of those found here: by `uv python find`, among pyenv's versions, on PATH.
--all adds the tests marked slow, --output benchmarks/results/releases.json keeps the counts and prints the table of
docs/status.md. Without a Python for a release there is nothing to test, which the last lines say; that is no failure.
Needs no package itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Python = tuple[int, int]
NEWEST_PYTHON: Python = (3, 13)  # of any release so far
# As the Makefile says it: without an NVIDIA driver pip prefers this release's CPU build wherever one is offered.
TORCH = "torch" if shutil.which("nvidia-smi") else "torch==2.13.0"
TEST_PACKAGES = ("pytest", "pytest-xdist", "filelock", "hypothesis", "psutil")
KINDS = ("passed", "failed", "skipped")

# What touches Megatron-Core; the other tests do not depend on its release.
PARTS: dict[str, tuple[str, ...]] = {
    "exactness": ("distributed/test_context_parallel.py", "distributed/test_exactness.py"),
    "models": (
        "distributed/test_models.py",
        "distributed/test_decoding.py",
        "distributed/test_upstream_layers.py",
    ),
    "conversion": ("distributed/test_conversion.py", "e2e/test_convert_cli.py"),
    "checkpoints": (
        "distributed/test_checkpoint_forms.py",
        "e2e/test_other_releases.py",
        "unit/test_checkpoint_safety.py",
        "unit/test_megatron_args.py",
        "unit/test_megatron_checkpoint.py",
        "unit/test_megatron_lm_checkpoint.py",
        "unit/test_releases.py",
    ),
    "resume": ("e2e/test_resume.py",),
    "offload": ("distributed/test_offload.py",),
    "memory": (
        "distributed/test_optimizer_offload.py",
        "distributed/test_recompute.py",
        "e2e/test_async_save.py",
        "unit/test_optimizer_memory.py",
        "unit/test_transformer_options.py",
    ),
    "head": ("distributed/test_head_memory.py", "distributed/test_linear_log_probs_sharded.py"),
    "bfloat16": ("e2e/test_bfloat16.py",),
    "router replay": ("distributed/test_router_replay.py", "unit/test_routing.py", "e2e/test_replayed_routing.py"),
    "diagnosis": ("distributed/test_diagnosis.py",),
    "runs": (
        "e2e/test_non_finite.py",
        "e2e/test_recorded_numbers.py",
        "e2e/test_streams.py",
        "unit/test_acceleration.py",
        "unit/test_check_megatron_core.py",
        "unit/test_cpu_support.py",
        "unit/test_rope.py",
    ),
}


# Interpreters


def find_pythons() -> dict[Python, str]:
    """Version -> an interpreter that ran and can make environments."""
    found: dict[Python, str] = {}
    for candidate in _candidates():
        version = _version(candidate)
        if version is not None:
            found.setdefault(version, candidate)
    return found


def _candidates() -> Iterator[str]:
    minors = range(11, NEWEST_PYTHON[1] + 1)
    if uv := shutil.which("uv"):
        for minor in minors:
            done = _run([uv, "python", "find", "--system", "--no-project", f"3.{minor}"])
            if done is not None and done.returncode == 0:
                yield done.stdout.strip()
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for minor in minors:
        yield from sorted(str(path) for path in pyenv.glob(f"versions/*/bin/python3.{minor}"))
    for name in (*(f"python3.{minor}" for minor in minors), "python3"):
        for folder in os.get_exec_path():
            if path := shutil.which(name, path=folder):
                yield path


@cache
def _version(python: str) -> Python | None:
    """Of an interpreter; None where it does not run, as pyenv's stand-ins do, or lacks what makes an environment."""
    done = _run([python, "-c", "import ensurepip, sys, venv; print(*sys.version_info[:2])"])
    if done is None or done.returncode != 0:
        return None
    major, minor = map(int, done.stdout.split())
    return major, minor


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None


def choose_python(release: str, pythons: dict[Python, str]) -> str | None:
    """The oldest that the release runs on, None if none is here."""
    oldest = (3, 11) if release.startswith("0.16.") else (3, 12)
    fitting = [version for version in pythons if oldest <= version <= NEWEST_PYTHON]
    return pythons[min(fitting)] if fitting else None


# Environments


def latest_release() -> str:
    """What constraints.txt has for the newest Pythons."""
    (release,) = re.findall(r"(?m)^megatron-core==(\S+); python_version >=", (ROOT / "constraints.txt").read_text())
    return release


def make_environment(release: str, python: str, folder: Path) -> str:
    """The interpreter of an environment with this release and what its tests need; installs only what has changed."""
    constraints = re.sub(r"(?m)^megatron-core==.*\n", "", (ROOT / "constraints.txt").read_text())
    constraints += f"megatron-core=={release}\n"
    wanted = "\n".join([TORCH, *TEST_PACKAGES, constraints, (ROOT / "pyproject.toml").read_text()])
    digest, stamp = hashlib.sha256(wanted.encode()).hexdigest(), folder / "installed"
    of_python, installed = stamp.read_text().splitlines() if stamp.is_file() else ("", "")
    inside = str(folder / "bin" / "python")
    if (of_python, installed) == (python, digest):
        return inside
    print(f"installing megatron-core {release} into {folder.name} (a few minutes the first time)", flush=True)
    subprocess.run([python, "-m", "venv", *(["--clear"] if of_python != python else []), str(folder)], check=True)
    (folder / "constraints.txt").write_text(constraints)
    pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--constraint", str(folder / "constraints.txt")]
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, *TEST_PACKAGES, "--editable", str(ROOT)], check=True)
    stamp.write_text(f"{python}\n{digest}\n")
    return inside


# Tests


def run_tests(python: str, *, with_slow: bool) -> tuple[int, dict[str, dict[str, int]]]:
    """(pytest's exit code, part -> how many tests passed, failed, were skipped)."""
    files = [f"tests/{file}" for files in PARTS.values() for file in files]
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [python, "-m", "pytest", "--numprocesses", "2", "--dist", "loadfile", f"--junitxml={report}"]
        command += ["-m", "not vllm" if with_slow else "not slow and not vllm", *files]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
        if not report.exists():
            sys.exit(f"pytest ended with {code} and left no report")
        return code, count(ElementTree.parse(report))


def count(report: ElementTree.ElementTree) -> dict[str, dict[str, int]]:
    """Of pytest's report for JUnit: part -> kind -> number of tests; one that cannot be imported failed."""
    parts = {f"tests/{file}"[:-3].replace("/", "."): part for part, files in PARTS.items() for file in files}
    counts = Counter()
    for case in report.iter("testcase"):
        part = parts[case.get("classname") or case.get("name", "")]
        failed = case.find("failure") is not None or case.find("error") is not None
        counts[part, "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"] += 1
    return {part: {kind: counts[part, kind] for kind in KINDS} for part in PARTS}


def versions_of(python: str) -> dict[str, str]:
    """Of what the numbers may depend on."""
    names = ("megatron-core", "torch", "transformers", "numpy")
    code = f"import json, platform as p; from importlib.metadata import version as v; \
print(json.dumps(dict(python=p.python_version(), **{{n: v(n) for n in {names}}})))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def report_of(row: dict[str, Any]) -> str:
    """One line for each part."""
    lines = [f"megatron-core {row['megatron-core']}, Python {row['python']}, torch {row['torch']}: {row['seconds']} s"]
    return "\n".join([*lines, *(f"  {part:12}{_text(numbers)}" for part, numbers in row["parts"].items())])


def _text(numbers: dict[str, int]) -> str:
    return ", ".join(f"{numbers[kind]} {kind}" for kind in KINDS if numbers[kind])


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: parts by releases, numbers alone where all tests of a part passed."""
    columns = [f"{row['megatron-core']}, Python {'.'.join(row['python'].split('.')[:2])}" for row in rows]
    lines = [" | ".join([part, *(_text(row["parts"][part]).removesuffix(" passed") for row in rows)]) for part in PARTS]
    return "\n".join(
        [f"| | {' | '.join(columns)} |", "|---" * (len(rows) + 1) + "|", *(f"| {line} |" for line in lines)]
    )


def keep(rows: list[dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """Put the rows among those of other releases; returns all."""
    kept = json.loads(output.read_text())["releases"] if output.exists() else []
    kept = [row for row in kept if row["megatron-core"] not in {new["megatron-core"] for new in rows}]
    kept = sorted(kept + rows, key=lambda row: row["megatron-core"])
    output.write_text(json.dumps({"releases": kept}, indent=2) + "\n")
    return kept


NO_PYTHON = """
########################################################################
#  NOT TESTED: megatron-core {releases}
#  It needs Python 3.12 or 3.13, and none was found: not by
#  `uv python find`, not among pyenv's versions, not on PATH.
#  What was tested is the release that Python 3.11 has, and no other.
########################################################################"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests what touches Megatron-Core under other releases of it.")
    parser.add_argument("releases", nargs="*", default=["latest"], help="0.17.1, latest or installed")
    parser.add_argument("--python", help="this interpreter, instead of the oldest that fits")
    parser.add_argument("--all", action="store_true", help="those marked slow, too")
    parser.add_argument("--output", type=Path, help="benchmarks/results/releases.json")
    options = parser.parse_args()
    pythons = {} if options.python else find_pythons()
    rows, lacking, failed = [], [], False
    for name in options.releases:
        release = latest_release() if name == "latest" else name
        python = sys.executable if name == "installed" else options.python or choose_python(release, pythons)
        if python is None:
            lacking.append(release)
            continue
        if name != "installed":
            python = make_environment(release, python, ROOT / f".venv-{name}")
        started = time.monotonic()
        code, parts = run_tests(python, with_slow=options.all)
        seconds = round(time.monotonic() - started)
        rows.append({**versions_of(python), "slow": options.all, "seconds": seconds, "parts": parts})
        failed |= code != 0
    print(*map(report_of, rows), sep="\n")
    if options.output and rows:
        print(table(keep(rows, options.output)))
    if lacking:
        print(NO_PYTHON.format(releases=", ".join(lacking)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
