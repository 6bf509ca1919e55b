"""One command for a machine with an NVIDIA GPU: tests, benchmarks and measurements, each within its time.

    python tools/gpu_suite.py [--minutes 25] [--parts tests,head] [--output benchmarks/results/gpu]
    python tools/gpu_suite.py --tiny        # on a CPU with gloo: shows that everything runs, measures nothing

Parts run in order of worth, each in a process of its own: the machine's peaks (always: ratios are quoted to those of
the same call), the tests of tests/gpu, the head beside its peers (tools/bench_log_probs.py), training steps of models
of Qwen2.5-0.5B's shape and of four of Qwen2.5-7B's layers with their time split, MFU and memory, embedded generation,
offloading, and NCCL in a world of one. What a part has found is in OUTPUT/PART.json when it ends, fails or runs out of
time. Needs torch, transformers and megatron-core, no network; a part whose package is missing says so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TINY_NOTE = "cpu, tiny: shows that it runs, nothing more"
TAIL_CHARACTERS = 4000


@dataclass(frozen=True)
class Place:
    """Where the suite runs."""

    work: Path  # models, logs: may go afterwards
    output: Path
    tiny: bool


@dataclass(frozen=True)
class Part:
    """A process, and what it leaves behind."""

    name: str
    what: str
    limit: float  # seconds it gets at most
    least: float  # seconds below which it is not worth starting
    packages: tuple[str, ...]  # that it cannot do without, as they are imported
    command: Callable[[Place], Sequence[str | Path]]
    collect: Callable[[Path], Any]  # of the file WORK/NAME.result, which the command writes


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_junit(path: Path) -> dict[str, Any]:
    """pytest's --junitxml: each test with its outcome."""
    tests, counts = [], dict.fromkeys(("passed", "failed", "skipped"), 0)
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        marks = {child.tag: child.get("message", "") for child in case}
        outcome = "skipped" if "skipped" in marks else "failed" if marks.keys() & {"failure", "error"} else "passed"
        counts[outcome] += 1
        message = next((marks[tag][:500] for tag in ("failure", "error", "skipped") if tag in marks), None)
        name = f"{case.get('classname')}::{case.get('name')}"
        tests.append({"test": name, "outcome": outcome, "seconds": float(case.get("time", 0)), "message": message})
    return {**counts, "tests": tests}


def measured(name: str, what: str, limit: float, least: float) -> Part:
    """A part of gpu_suite_parts.py."""

    def command(place: Place) -> list[str | Path]:
        files = {
            "--work": place.work,
            "--result": place.work / f"{name}.result",
            "--peaks": place.output / "peaks.json",
        }
        options: list[str | Path] = [word for pair in files.items() for word in pair]
        script = ROOT / "tools" / "gpu_suite_parts.py"
        return [sys.executable, script, name, *options, *(["--tiny"] if place.tiny else [])]

    packages = ("torch",) if name == "peaks" else ("torch", "transformers", "megatron.core", "pydantic", "tenacity")
    return Part(name, what, limit, least, packages, command, read_json)


def tests_command(place: Place) -> list[str | Path]:
    junit = f"--junitxml={place.work / 'tests.result'}"
    return [sys.executable, "-m", "pytest", ROOT / "tests" / "gpu", "-v", "-p", "no:cacheprovider", junit]


def head_command(place: Place) -> list[str | Path]:
    sizes = "--tokens 32 --hidden 64 --vocab 512 --repeats 1" if place.tiny else "--tokens 8192 2048 32768"
    script = ROOT / "tools" / "bench_log_probs.py"
    return [sys.executable, script, *sizes.split(), "--output", place.work / "head.result"]


PEAKS = measured("peaks", "hardware, versions, a bf16 matrix product and copies", 120, 20)
PARTS = (
    PEAKS,
    Part("tests", "tests/gpu", 480, 90, ("torch", "pytest", "megatron.core"), tests_command, read_junit),
    Part("head", "the fused head beside its peers", 420, 60, ("torch",), head_command, read_json),
    measured("train_0.5b", "training steps of Qwen2.5-0.5B's shape", 300, 90),
    measured("train_7b", "training steps of 4 layers of Qwen2.5-7B's shape", 300, 90),
    measured("generate", "embedded generation, Qwen2.5-0.5B's shape", 240, 60),
    measured("offload", "weights and optimizer to the host and back, Qwen2.5-0.5B's shape", 180, 60),
    measured("nccl", "NCCL with one GPU: start, all-reduce, the weights' broadcast", 120, 45),
)


def allot(part: Part, left: float) -> float | None:
    """Seconds that a part gets of those left, None where that is too little to start it."""
    return min(part.limit, left) if left >= part.least else None


def missing_packages(names: Sequence[str]) -> list[str]:
    return [name for name in names if not is_installed(name)]


def is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def run_suite(parts: Sequence[Part], place: Place, seconds: float, *, always: bool = False) -> list[dict[str, Any]]:
    """Run the parts that fit, in order; returns their records, which are also files.

    always: go on where the first part found no GPU.
    """
    end = time.monotonic() + seconds
    records: list[dict[str, Any]] = []
    environment: Any = None
    for part in parts:
        record = run_part(part, place, end - time.monotonic(), environment)
        records.append(record)
        print(f"{part.name:12} {record['status']}, {record['seconds']:.0f} s", flush=True)
        if part is PEAKS:
            environment = record["environment"]
            if not always and (environment or {}).get("device") != "cuda":
                print(f"{record['tail']}\nstopped: no GPU was found, and nothing else was run", flush=True)
                break
    return records


def run_part(part: Part, place: Place, left: float, environment: Any) -> dict[str, Any]:
    """Run one part and write its record, whatever becomes of it."""
    command = list(map(str, part.command(place)))
    seconds = allot(part, left)
    record: dict[str, Any] = {
        "part": part.name,
        "what": part.what,
        "note": TINY_NOTE if place.tiny else None,
        "status": "stopped from outside",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "time_limit": seconds,
        "command": shown(" ".join(command), place),
        "environment": environment,
        "result": None,
        "tail": "",
    }
    path = place.output / f"{part.name}.json"
    if missing := missing_packages(part.packages):
        record["status"] = f"not installed: {', '.join(missing)}"
        write_json(path, record)
        return record
    if seconds is None:
        record["status"] = f"skipped: {max(left, 0):.0f} s are left, and it needs {part.least:.0f}"
        if not path.exists():  # else an earlier call had the time
            write_json(path, record)
        return record
    start = time.monotonic()
    log = place.work / f"{part.name}.log"
    try:
        record["status"] = run_command(command, log, seconds, environment_variables(place))
    finally:
        record["seconds"] = round(time.monotonic() - start, 1)
        record["tail"] = shown(log.read_text(encoding="utf-8", errors="replace")[-TAIL_CHARACTERS:], place)
        with suppress(OSError, ValueError, ElementTree.ParseError):  # not written, or torn
            record["result"] = part.collect(place.work / f"{part.name}.result")
        if part is PEAKS:
            record["environment"] = (record["result"] or {}).get("environment")
        write_json(path, record)
    return record


def run_command(command: Sequence[str], log: Path, seconds: float, variables: Mapping[str, str]) -> str:
    """Run it in a process group of its own, output to a file; returns how it ended."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=dict(variables), start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"timed out after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                end_group(process)
    return "done" if code == 0 else f"failed with exit code {code}"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and the group: pytest writes what it has when it is interrupted."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment_variables(place: Place) -> dict[str, str]:
    """This process's, with the package on the path; `tiny` hides GPUs."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return found | ({"CUDA_VISIBLE_DEVICES": ""} if place.tiny else {})


def shown(text: str, place: Place) -> str:
    """Without this machine's paths."""
    names: dict[str | Path, str] = {place.work: "WORK", place.output: "OUTPUT", ROOT: ".", sys.executable: "python"}
    names |= {sys.prefix: "PREFIX", sys.base_prefix: "PREFIX"}
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    names |= dict.fromkeys(filter(os.path.isabs, entries), "PYTHONPATH")  # a relative one, such as ".", is in any text
    for path, name in names.items():
        text = text.replace(str(path), name)
    return text


def write_json(path: Path, record: Any) -> None:
    """In one move: a stop leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part under way is ended and recorded
    with tempfile.TemporaryDirectory(prefix="gpu_suite_") as work:
        arguments.output.mkdir(parents=True, exist_ok=True)
        place = Place(Path(work), arguments.output.resolve(), arguments.tiny)
        print(f"results: {place.output}" + (f" ({TINY_NOTE})" if place.tiny else ""), flush=True)
        chosen = [part for part in PARTS if part is PEAKS or part.name in arguments.parts]
        records = run_suite(chosen, place, 60 * arguments.minutes, always=arguments.tiny)
    sys.exit(any(record["status"].startswith(("failed", "timed out")) for record in records))


def parse() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0, help="for all; a part that does not fit is skipped")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=names, help=f"of {','.join(names)}")
    parser.add_argument("--tiny", action="store_true", help=f"{TINY_NOTE}; GPUs are hidden")
    parser.add_argument("--output", type=Path, help="benchmarks/results/gpu; with --tiny a new temporary directory")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(names):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if arguments.output is None:
        arguments.output = Path(tempfile.mkdtemp(prefix="gpu_suite_tiny_")) if arguments.tiny else RESULTS / "gpu"
    if arguments.tiny and arguments.output.resolve().is_relative_to(RESULTS):
        parser.error("--tiny measures nothing: keep its files out of benchmarks/results")
    return arguments


if __name__ == "__main__":
    main()
