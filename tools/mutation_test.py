"""Mutation testing of the pure parts: how many small changes to the code do the tests notice?

    pip install -e .[dev,mutation] -c constraints.txt
    python tools/mutation_test.py [PATH ...] [--sample 200] [--seed 0] [--survivors-of FILE] [--output FILE]

The changes are mutmut's: a sample of all that it makes inside functions, drawn uniformly. Each is written into a copy
of the project, whose tests then run until one fails, in a fork of this process, which has imported torch already.
Prints the score and what survived; the JSON has every change of the sample, what became of it and the test that failed.
`--survivors-of` runs again what survived in an earlier result and is still to be had.
"""

from __future__ import annotations

import argparse
import difflib
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import libcst
import psutil
import pytest
import torch.testing  # noqa: F401  before the first fork, which then need not import torch
from bench_environment import hardware, versions
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.data import LineSpan  # noqa: F401  the package must be whole before its parts are imported
from mutmut.mutation.file_mutation import Mutation, MutationVisitor
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

ROOT = Path(__file__).parents[1]
PACKAGE = "chord_megatron"
PATHS = [f"{PACKAGE}/{room}" for room in ("algorithm", "batching", "ops")]
LEFT_OUT = ("__init__.py", "linear_log_probs_triton.py", "weight_gradient.py")  # the GPU's half of ops/
MEMORY_BYTES = 12 * 2**30  # a mutant must not take the machine's memory

Outcome = Literal["killed", "timeout", "survived"]


@dataclass(frozen=True)
class Mutant:
    """One change to one file."""

    path: str
    line: int
    diff: str
    code: str  # the whole file, changed


@dataclass(frozen=True)
class Result:
    """What became of a mutant. killed_by: the first test that failed; empty where none was run to its end."""

    path: str
    line: int
    diff: str
    outcome: Outcome
    killed_by: str
    seconds: float


# --- mutants --------------------------------------------------------------------------------------------------------


class Visitor(MutationVisitor):
    """mutmut's, which leaves decorated functions out only because of how it switches between mutants."""

    def _skip_node_and_children(self, node: libcst.CSTNode) -> bool:
        return not isinstance(node, libcst.FunctionDef) and super()._skip_node_and_children(node)


def mutations_of(module: MetadataWrapper) -> list[Mutation]:
    """All changes inside functions and class bodies."""
    visitor = Visitor(mutation_operators, IgnoredCode(set(), set(), set()))
    module.visit(visitor)
    return [mutation for mutation in visitor.mutations if mutation.contained_by_top_level_function is not None]


def make_mutant(path: str, module: MetadataWrapper, mutation: Mutation) -> Mutant | None:
    """None where the changed file is no Python."""
    code = module.module.deep_replace(mutation.original_node, mutation.mutated_node).code  # type: ignore[union-attr]
    try:
        compile(code, path, "exec")
    except SyntaxError:
        return None
    line = module.resolve(PositionProvider)[mutation.original_node].start.line
    lines = difflib.unified_diff(module.module.code.splitlines(), code.splitlines(), n=0, lineterm="")
    diff = "\n".join(text for text in lines if not text.startswith(("---", "+++", "@@")))
    return Mutant(path, line, diff, code)


def source_files(paths: Sequence[str]) -> list[str]:
    """Relative to the project, in order."""
    files = [file for path in paths for file in ([ROOT / path] if path.endswith(".py") else (ROOT / path).glob("*.py"))]
    return sorted(file.relative_to(ROOT).as_posix() for file in files if file.name not in LEFT_OUT)


def parse(path: str) -> MetadataWrapper:
    return MetadataWrapper(libcst.parse_module((ROOT / path).read_text()))


def draw_mutants(paths: Sequence[str], sample: int, seed: int) -> tuple[list[Mutant], int]:
    """A uniform sample in the order of the files, and how many changes there are in all."""
    modules = {path: parse(path) for path in source_files(paths)}
    population = [(path, mutation) for path, module in modules.items() for mutation in mutations_of(module)]
    chosen: dict[tuple[str, str], Mutant] = {}  # by code, which two changes may have in common
    for path, mutation in random.Random(seed).sample(population, len(population)):
        if len(chosen) == sample:
            break
        if mutant := make_mutant(path, modules[path], mutation):
            chosen[path, mutant.code] = mutant
    return sorted(chosen.values(), key=lambda mutant: (mutant.path, mutant.line, mutant.diff)), len(population)


def find_mutants(wanted: set[tuple[str, str]]) -> list[Mutant]:
    """Those of the wanted paths and diffs that the code still allows."""
    found = []
    for path in sorted({path for path, _ in wanted}):
        module = parse(path)
        spans, lines = module.resolve(PositionProvider), module.module.code.splitlines()
        removed = {text for other, diff in wanted if other == path for text in diff.splitlines() if text[0] == "-"}
        for mutation in mutations_of(module):
            span = spans[mutation.original_node]
            # Making a mutant takes its time: only where the diff has a line of the node.
            if removed & {f"-{line}" for line in lines[span.start.line - 1 : span.end.line]}:
                mutant = make_mutant(path, module, mutation)
                found += [mutant] if mutant and (path, mutant.diff) in wanted else []
    return found


# --- tests ----------------------------------------------------------------------------------------------------------


def tests_of(path: str) -> list[str]:
    """The unit tests that import from the file's room."""
    room = ".".join(path.split("/")[:2])
    return sorted(
        file.relative_to(ROOT).as_posix() for file in (ROOT / "tests/unit").glob("*.py") if room in file.read_text()
    )


class Plugin:
    """Of pytest: quick tests first, as far as times are known, and a note of the first failure and of the times."""

    def __init__(self, project: Path) -> None:
        self.failed = project / "failed.txt"
        self.times = project / "times.json"
        self.seconds: dict[str, float] = json.loads(self.times.read_text()) if self.times.exists() else {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Tests of several processes last: what starts those is a fixture, which is in no test's time."""
        items.sort(
            key=lambda item: (item.get_closest_marker("distributed") is not None, self.seconds.get(item.nodeid, 0.0))
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration
        if report.failed and not self.failed.exists():
            self.failed.write_text(report.nodeid)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus == 0:
            self.times.write_text(json.dumps(self.seconds))


def run_pytest(project: Path, tests: Sequence[str]) -> None:
    """In a process of its own: run the tests of the copy, quietly."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    os.chdir(project)
    with open("output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.path[0] = str(project)  # instead of tools/
    sys.modules["__main__"] = ModuleType("__main__")  # a process that a test starts must not import this file
    os.environ["PYTHONPATH"] = str(project)  # of what the tests start
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # two mutants may have one size and one time
    sys.dont_write_bytecode = True
    options = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", "scratch"]
    os._exit(pytest.main([*options, *tests], plugins=[Plugin(project)]))


def end(process: multiprocessing.process.BaseProcess) -> None:
    """With all that it started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.join()


def run_tests(project: Path, tests: Sequence[str], limit_seconds: float) -> tuple[Outcome, str]:
    """Outcome and the first test that failed."""
    failed = project / "failed.txt"
    failed.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=run_pytest, args=(project, tests))
    process.start()
    process.join(limit_seconds)
    if process.exitcode is None:
        end(process)
        return "timeout", ""
    if process.exitcode in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest could not run {tests}:\n{(project / 'output.txt').read_text()}")
    if process.exitcode == 0:
        return "survived", ""
    return "killed", failed.read_text() if failed.exists() else ""


def test_mutants(mutants: Sequence[Mutant]) -> Iterator[Result]:
    """Each mutant in a copy of the project, after the copy's tests have passed without one."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        for name in (PACKAGE, "tests", "tools"):
            shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", project)
        limits = {tuple(tests_of(path)): 0.0 for path in {mutant.path for mutant in mutants}}
        for tests in limits:
            start = time.perf_counter()
            if run_tests(project, tests, 3600)[0] != "survived":
                raise RuntimeError(f"{tests} fail without a mutant:\n{(project / 'output.txt').read_text()}")
            limits[tests] = 60 + 3 * (time.perf_counter() - start)
        for mutant in mutants:
            yield test_mutant(project, mutant, limits)


def test_mutant(project: Path, mutant: Mutant, limits: dict[tuple[str, ...], float]) -> Result:
    file, tests = project / mutant.path, tuple(tests_of(mutant.path))
    original = file.read_text()
    file.write_text(mutant.code)
    start = time.perf_counter()
    try:
        outcome, killed_by = run_tests(project, tests, limits[tests])
    finally:
        file.write_text(original)
    seconds = round(time.perf_counter() - start, 2)
    return Result(mutant.path, mutant.line, mutant.diff, outcome, killed_by, seconds)


# --- results --------------------------------------------------------------------------------------------------------


def score(results: Sequence[Result]) -> float:
    return sum(result.outcome != "survived" for result in results) / len(results)


def scores_of_files(results: Sequence[Result]) -> dict[str, str]:
    """Killed / all of each file."""
    of_file: dict[str, list[Result]] = {}
    for result in results:
        of_file.setdefault(result.path, []).append(result)
    return {
        path: f"{sum(r.outcome != 'survived' for r in found)}/{len(found)}" for path, found in sorted(of_file.items())
    }


def survivors(file: Path) -> set[tuple[str, str]]:
    results = json.loads(file.read_text())["mutants"]
    return {(result["path"], result["diff"]) for result in results if result["outcome"] == "survived"}


def report(results: Sequence[Result], **facts: Any) -> dict[str, Any]:
    return {
        "score": round(score(results), 4),
        **facts,
        "seconds": round(sum(result.seconds for result in results), 1),
        "files": scores_of_files(results),
        "versions": versions(["mutmut", "pytest", "torch"]),
        "hardware": hardware(),
        "mutants": [asdict(result) for result in results],
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=PATHS, help="files or folders below the project")
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors-of", type=Path, help="an earlier result")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/mutation.json")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.survivors_of:
        mutants = find_mutants(survivors(arguments.survivors_of))
        population = len(mutants)
    else:
        mutants, population = draw_mutants(arguments.paths, arguments.sample, arguments.seed)
    results = []
    for result in test_mutants(mutants):
        results.append(result)
        print(
            f"{len(results)}/{len(mutants)} {result.outcome} {result.seconds:.1f} s {result.path}:{result.line}",
            flush=True,
        )
        if result.outcome == "survived":
            print(result.diff, flush=True)
    facts = {"sample": len(mutants), "population": population, "seed": arguments.seed}
    arguments.output.write_text(json.dumps(report(results, **facts), indent=1) + "\n")
    print(f"score {score(results):.1%} of {len(results)} mutants; {arguments.output}")


if __name__ == "__main__":
    main()
